"""Training steps of a preset beside Transformers of the same size: tokens per second, and memory.

A step is forward, backward, gradient clipping and fused AdamW, without dropout; on CUDA under bfloat16 autocast,
including the residual streams of all models, elsewhere in float32. For the sizes of a GPU, all models are compiled as
a whole, and a step is replayed from one CUDA graph; the peak of memory is that of a step before the capture. On the CPU
the peak is that of the second step of a new process.

The plain Transformer is pre-norm with rotary positions, SDPA, GELU and an untied head. The Transformer with our parts
is our model without BK-Core, whose every block attends to all tokens: it has our short convolution, L2-normalised
queries and keys, norm and gate of the read-out, and feed-forward network. All have our loss, which holds a chunk of the
logits at a time. Speed-ups are over the plain one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from resolvent.benchmark.harness import Bench, Check, Measurement, Outcome, Scale
from resolvent.benchmark.memory import in_fresh_process, peak_resident_bytes
from resolvent.benchmark.peers import GPT
from resolvent.benchmark.report import Target
from resolvent.benchmark.timing import Work, capture, greatest, milliseconds
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel, get_phase2_preset

SECTION = "training"
_OURS, _PLAIN, _WITH_PARTS = "ours", "GPT", "GPT with our parts"
_MOST_CHECKED = {"cuda": 16_384, "cpu": 1024}
"""Length of a checked sequence, to limit the memory of float64."""


@dataclass(frozen=True)
class Case:
    """Case of training steps of a size.

    Attributes:
        speedup: target of our speed over that of the plain Transformer.
    """

    preset: str
    batch: int
    length: int
    speedup: Target | None = None

    def __str__(self) -> str:
        return f"{self.preset}, B{self.batch} N{self.length}"


CASES = {
    "cuda": (
        Case("base", 16, 1024, Target(1.05, 1.0, at_most=False)),
        Case("base-hybrid", 16, 1024, Target(1.05, 0.95, at_most=False)),
        Case("large", 8, 2048, Target(1.15, 1.0, at_most=False)),
        Case("large-hybrid", 8, 2048, Target(1.15, 1.0, at_most=False)),
        Case("base-hybrid", 1, 16_384, Target(1.8, 1.5, at_most=False)),
        Case("base-hybrid", 1, 65_536, Target(5.0, 3.0, at_most=False)),
    ),
    "cpu": (
        Case("base", 1, 1024, Target(1.1, 1.0, at_most=False)),
        Case("base", 1, 4096, Target(1.3, 1.15, at_most=False)),
    ),
    "quick": (Case("tiny", 1, 100),),
}


def measurements(scale: Scale) -> list[Measurement]:
    """Return a measurement of every case of a scale."""
    return [Measurement(SECTION, str(case), partial(_measure, case=case)) for case in CASES[scale]]


def _measure(bench: Bench, case: Case) -> None:
    """Measure speed and memory of a step; of the first case also the share of consolidation."""
    outcome = _measure_step(bench, case)
    speed, memory = outcome.part(0), outcome.part(1)
    work = Work(flops=6 * case.batch * case.length * multiplied_parameters(case.preset) + attention_flops(case))
    seconds = case.batch * case.length / speed.ours if speed.ours else None
    bench.add(SECTION, str(case), "tokens/s", speed, work=work, seconds=seconds)
    if speed.ours is not None and _PLAIN in speed.peers:
        speedup = speed.ours / speed.peers[_PLAIN]
        bench.add_figure(SECTION, f"{case}, ours / {_PLAIN}", "times", speedup, case.speedup)
    if bench.device.type == "cuda":
        bench.add(SECTION, f"{case}, peak memory", "GiB", dataclasses.replace(memory, error=None, failures={}))
    else:
        bench.add(SECTION, f"{case}, peak memory", "GiB", _compare_process_peaks(bench, case))
    if case == CASES[bench.scale][0] and speed.ours is not None:
        _add_share_of_consolidation(bench, case, speed.ours)


def _add_share_of_consolidation(bench: Bench, case: Case, speed: float) -> None:
    """Add the share of a step that SNR filter and resonance take, given the tokens per second with both."""
    without = bench.measure(
        f"{case}, without consolidation",
        lambda _: speed_and_memory(
            _our_step(bench, case, snr_enabled=False, resonance_enabled=False), case, bench.device
        ),
    ).part(0)
    if without.ours is not None:
        target = Target(0.02) if bench.device.type == "cuda" else None
        bench.add_figure(SECTION, f"{case}, consolidation", "of a step", 1 - speed / without.ours, target)


def _measure_step(bench: Bench, case: Case) -> Outcome:
    def ours(check: Check) -> tuple[float, float]:
        step = _our_step(bench, case)
        check(step_error(step, _shortened(case, bench.device), bench.device))
        return speed_and_memory(step, case, bench.device)

    def transformer(name: str) -> tuple[float, float]:
        step = _step(new_transformer(case.preset, bench.device, name), bench, bench.scale == "cuda")
        return speed_and_memory(step, case, bench.device)

    transformers = {name: partial(transformer, name) for name in (_PLAIN, _WITH_PARTS)}
    return bench.measure(str(case), ours, transformers, tolerance=5e-2 if bench.dtype == torch.bfloat16 else 1e-4)


def _our_step(bench: Bench, case: Case, **options: Any) -> "Step":
    model = new_model(case.preset, bench.device, **options)
    return _step(model, bench, bench.scale == "cuda" and bench.compiled)


def _step(model: nn.Module, bench: Bench, compiled: bool) -> "Step":
    run = torch.compile(model, dynamic=False) if compiled else model
    return Step(model, lambda ids, labels: run(ids, labels=labels), bench.dtype == torch.bfloat16)


def _shortened(case: Case, device: torch.device) -> Case:
    return dataclasses.replace(case, length=min(case.length, _MOST_CHECKED[device.type]))


def _compare_process_peaks(bench: Bench, case: Case) -> Outcome:
    def peak(name: str) -> float:
        return in_fresh_process(process_peak, case, name)

    return bench.measure(f"{case}, peak memory", lambda _: peak(_OURS), {_PLAIN: partial(peak, _PLAIN)})


def process_peak(case: Case, name: str) -> float:
    """Return the peak GiB of two steps of a model, without the memory that this process held before.

    Call this function in a new process, since a process keeps only its highest peak. The second step holds the averages
    of the optimiser beside the activations.

    Args:
        case: size of the step.
        name: `ours`, or the name of a Transformer.
    """
    device, before = torch.device("cpu"), peak_resident_bytes()
    model = new_model(case.preset, device) if name == _OURS else new_transformer(case.preset, device, name)
    step = Step(model, lambda ids, labels: model(ids, labels=labels), autocast=False)
    for _ in range(2):
        step(*batch(case, device))
    return (peak_resident_bytes() - before) / 2**30


def configuration(preset: str) -> Phase2Config:
    """Return the preset without dropout; the Transformer has none, either."""
    return dataclasses.replace(get_phase2_preset(preset), dropout=0.0)


Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean negative log-likelihood (nats per token) from input tokens and labels, both (B, N)."""


class Step:
    """Model with its optimiser and a loss.

    Args:
        model: the model, on its device.
        loss: (input_ids, labels) -> mean nats.
        autocast: whether to compute in bfloat16.
    """

    def __init__(self, model: nn.Module, loss: Loss, autocast: bool) -> None:
        self.parameters, self.loss = list(model.parameters()), loss
        kind = self.parameters[0].device.type
        # Weights in the cache of autocast are freed before a graph that reads them.
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=autocast, cache_enabled=False)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True, capturable=kind == "cuda")

    def gradient(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Compute the gradient into the parameters; return the loss."""
        with self.autocast:
            loss = self.loss(input_ids, labels)
        loss.backward()
        return loss.detach()

    def __call__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.gradient(input_ids, labels)
        clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def new_model(preset: str, device: torch.device, **options: Any) -> Phase2IntegratedModel:
    """Return a model with random weights for comparisons in half precision; ``options`` replace fields of the preset.

    Noise gives every part an effect, also those that start at zero; embeddings are as large as the outputs of the
    blocks, since the first norm would amplify the rounding of small ones.
    """
    torch.manual_seed(0)
    model = Phase2IntegratedModel(dataclasses.replace(configuration(preset), **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for parameter in model.token_embedding.parameters():
            parameter.mul_(50 / model.embedding_factor)
    return model.to(device).train()


def step_error(step: Step, case: Case, device: torch.device) -> float:
    """Return the relative error of loss and gradient of ``new_model`` to the torch operators in float64."""
    ids, labels = batch(case, device)
    loss = step.gradient(ids, labels)
    exact = new_model(case.preset, device, backend="torch").double()
    exact_loss = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(case.batch):  # one sequence at a time, to limit the memory of float64
        part = exact(ids[i : i + 1], labels=labels[i : i + 1]) / case.batch
        part.backward()
        exact_loss += part.detach()
    wrong = right = 0.0
    for ours, reference in zip(step.parameters, exact.parameters(), strict=True):
        assert ours.grad is not None and reference.grad is not None
        wrong += (ours.grad.double() - reference.grad).square().sum().item()
        right += reference.grad.square().sum().item()
    loss_error = ((loss.double() - exact_loss) / exact_loss).abs().item()
    step.optimizer.zero_grad()
    return greatest([loss_error, (wrong / right) ** 0.5])


def batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random tokens and labels, (B, N)."""
    vocabulary = configuration(case.preset).vocab_size
    ids = torch.randint(vocabulary, (case.batch, case.length + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def new_transformer(preset: str, device: torch.device, name: str) -> nn.Module:
    """Return the Transformer of that name, as large as a preset; given ``labels`` it returns their loss."""
    if name == _WITH_PARTS:
        blocks = tuple(range(configuration(preset).n_layers))
        everywhere = dict(attention_layers=blocks, attention_window=None, attention_windows=None)
        without_memory = dict(bk_core=False, memory_feedback=False, snr_enabled=False, resonance_enabled=False)
        return new_model(preset, device, **everywhere, **without_memory)
    torch.manual_seed(0)
    return GPT.like(configuration(preset)).to(device)


def speed_and_memory(step: Step, case: Case, device: torch.device) -> tuple[float, float]:
    """Return tokens per second, and peak GiB (zero except on CUDA)."""
    memory, jobs = 0.0, [_on(step, batch(case, device)) for _ in range(2)]
    if device.type == "cuda":
        for job in jobs:  # the first step compiles, and makes the averages of the optimiser
            torch.cuda.reset_peak_memory_stats()
            job()
        memory = torch.cuda.max_memory_allocated() / 2**30
        jobs = [capture([job]).replay for job in jobs]
    turns = iter(jobs)
    ms = milliseconds(lambda: next(turns), 1e12, device)
    return 1000 * case.batch * case.length / ms, memory


def _on(step: Step, tokens: tuple[Tensor, Tensor]) -> Callable[[], None]:
    return lambda: step(*tokens)


def attention_flops(case: Case) -> int:
    """Return the operations of a step in the products of attention: 12 per pair of tokens and channel."""
    config = configuration(case.preset)
    reach = min(config.attention_window or case.length, case.length)
    pairs = reach * case.length - reach * (reach - 1) // 2  # the first tokens have fewer before them
    return 12 * case.batch * pairs * config.num_heads * config.head_dim * len(config.attention_layers)


def multiplied_parameters(preset: str) -> int:
    """Return the number of parameters in matrices that every token is multiplied by."""
    with torch.device("meta"):
        model = Phase2IntegratedModel(configuration(preset), init=False)
    looked_up = set(model.token_embedding.parameters())
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and p not in looked_up)
