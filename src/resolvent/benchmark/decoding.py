"""Generation at batch 1 after a short and a long context, at a large batch, and the speed of reading.

Weights are bfloat16 on CUDA and float32 elsewhere. Our model reads with ``model.read``, which applies the head to the
last token alone, and generates with ``model.stream``. The Transformer attends to a cache of keys and values. On CUDA
its context is one long one, and its step is replayed from a CUDA graph, of plain operations and of compiled ones. On
the CPU its context has as many tokens as that of our model; the steps of both models are measured as they are and
compiled, and their weights, which ``prepare_weights`` lays out, in float32 and in int8.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resolvent.benchmark import training
from resolvent.benchmark.harness import Bench, Check, Measurement, Outcome, Scale
from resolvent.benchmark.peers import GPT, KVCache, RingCache
from resolvent.benchmark.report import Target
from resolvent.benchmark.timing import Work, capture, greatest, relative_error, synchronize
from resolvent.models.compilation import compiled
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel, Phase2State
from resolvent.models.reading import piece_length
from resolvent.models.weights import Precision, prepare_weights

SECTION = "decoding"
_WARM_UP = 8
"""Warm-up tokens before the clock starts, for one-time preparations."""
_CHECKED = Phase2Config.consolidation_interval + 44
"""Checked tokens: a little more than a consolidation interval."""
_CHECKED_ROWS = 4
"""Sequences of a large batch that are checked."""


@dataclass(frozen=True)
class Case:
    """Case of generation by a preset at batch 1.

    Attributes:
        few, many: tokens of the short and the long context.
        piece: tokens that the Transformer reads at once.
        context: tokens in the Transformer's cache; None for as many as our model has read.
        generated: number of timed tokens.
        reading: target of reading, in tokens per second.
        speed: target in tokens per second.
        speedup: target of our speed over that of the Transformer.
        speedup_many: the same after the long context, where it differs.
        steadiness: target of our speed after the long context over that after the short one.
        memory: target of the peak while reading, in GiB.
    """

    preset: str
    few: int
    many: int
    piece: int
    context: int | None
    generated: int
    reading: Target | None = None
    speed: Target | None = None
    speedup: Target | None = None
    speedup_many: Target | None = None
    steadiness: Target | None = None
    memory: Target | None = None

    def __str__(self) -> str:
        return f"{self.preset}, B1"


@dataclass(frozen=True)
class Crowd:
    """Case of generation by a preset at a large batch.

    Attributes:
        sequences: number of sequences.
        context: tokens that each has read.
        generated: number of timed tokens of a sequence.
        speedup: target of our speed over that of the Transformer.
    """

    preset: str
    sequences: int
    context: int
    generated: int
    speedup: Target | None = None

    def __str__(self) -> str:
        return f"{self.preset}, B{self.sequences}"


CASES = {
    "cuda": [
        Case(
            "base",
            few=100,
            many=1_000_000,
            piece=2048,
            context=16_384,
            generated=512,
            reading=Target(2_000_000, least=1_000_000, at_most=False),
            speed=Target(9000, least=7500, at_most=False),
            speedup=Target(2.0, at_most=False),
            steadiness=Target(0.98, at_most=False),
            memory=Target(4.0),
        ),
        Case(
            "base-hybrid",
            few=100,
            many=1_000_000,
            piece=2048,
            context=16_384,
            generated=512,
            speed=Target(7500, least=6000, at_most=False),
            steadiness=Target(0.98, at_most=False),
            memory=Target(4.0),
        ),
    ],
    "cpu": [
        Case(
            "base",
            few=100,
            many=20_000,
            piece=1000,
            context=None,
            generated=64,
            speedup=Target(1.0, 0.87, at_most=False),
            speedup_many=Target(3.3, 2.5, at_most=False),
            steadiness=Target(0.9, at_most=False),
        ),
    ],
    "quick": [Case("tiny", few=20, many=200, piece=50, context=64, generated=16)],
}
CROWDS = {
    "cuda": [
        Crowd("base", 64, 16_384, 256, Target(5.0, least=3.0, at_most=False)),
        Crowd("base-hybrid", 64, 16_384, 256, Target(5.0, least=3.0, at_most=False)),
    ],
    "cpu": [],
    "quick": [Crowd("tiny", 3, 40, 8)],
}


def measurements(scale: Scale) -> list[Measurement]:
    """Return measurements of one sequence, then of large batches."""
    return [
        *(Measurement(SECTION, str(case), partial(_measure_alone, case=case)) for case in CASES[scale]),
        *(Measurement(SECTION, str(crowd), partial(_measure_crowd, crowd=crowd)) for crowd in CROWDS[scale]),
    ]


def _measure_alone(bench: Bench, case: Case) -> None:
    """Measure reading, and generation after few and many tokens, of one sequence."""
    states: dict[int, Phase2State] = {}
    name = f"{case}, reading {case.many:,} tokens"

    def read_many(check: Check) -> tuple[float, float]:
        model = _model(bench, case.preset)
        check(reading_error(model, _exact_model(bench, case.preset), _tokens(bench, case.preset, _CHECKED)))
        speed, memory, states[case.many] = read(model, _tokens(bench, case.preset, case.many))
        return speed, memory

    reading = bench.measure(name, read_many, tolerance=_tolerance(bench))
    bench.add(SECTION, name, "tokens/s", reading.part(0), target=case.reading)
    if bench.device.type == "cuda":
        peak = dataclasses.replace(reading.part(1), error=None, failures={})
        bench.add(SECTION, f"{name}, peak memory", "GiB", peak, target=case.memory)

    if bench.scale == "cpu":
        for precision, compiles in (("int8", False), ("int8", True), ("full", True)):
            for count in (case.few, case.many):
                variant = Variant(precision, compiles)
                outcome = _generation(bench, case, count, states, _transformers(bench, case, count, variant), variant)
                _add_generation(bench, case, count, outcome, variant)
    few = _generation(bench, case, case.few, states, _transformers(bench, case, case.context or case.few))
    if case.context is None:
        many = _generation(bench, case, case.many, states, _transformers(bench, case, case.many))
    else:
        many = _generation(bench, case, case.many, states, {})
        many = dataclasses.replace(many, figures={**few.peers, **many.figures})
    for count, outcome in ((case.few, few), (case.many, many)):
        _add_generation(bench, case, count, outcome)
    if few.ours and many.ours:
        name = f"{case}, generating, after {case.many:,} / after {case.few:,}"
        bench.add_figure(SECTION, name, "times", many.ours / few.ours, case.steadiness)


def _measure_crowd(bench: Bench, crowd: Crowd) -> None:
    """Measure generation of many sequences at once, in tokens of all of them."""

    def ours(check: Check) -> float:
        model, prompts = _model(bench, crowd.preset), _tokens(bench, crowd.preset, 1, crowd.sequences)
        _, state = model.read(_tokens(bench, crowd.preset, crowd.context, crowd.sequences))
        check(regret(model, _exact_model(bench, crowd.preset), state[:_CHECKED_ROWS], prompts[:_CHECKED_ROWS]))
        stream = model.stream(prompts, _WARM_UP + crowd.generated, temperature=0, state=state)
        return crowd.sequences * _speed(lambda: next(stream), crowd.generated, bench.device)

    def transformer(compiles: bool) -> float:
        torch.manual_seed(0)
        gpt = GPT.like(training.configuration(crowd.preset)).to(bench.device, bench.dtype).eval()
        cache = gpt.new_cache(crowd.sequences, crowd.context)
        for x in (cache.keys, cache.values):
            x.normal_()  # the speed does not depend on what was read
        cache.advance(crowd.context)
        speed = _ring_speed(bench, gpt, cache, crowd.sequences, crowd.generated, compiles)
        return crowd.sequences * speed

    name = f"{crowd}, generating after {crowd.context:,} tokens"
    peers = _captured(bench, transformer) if bench.device.type == "cuda" else {"GPT": lambda: transformer(False)}
    outcome = bench.measure(name, ours, peers, tolerance=2 * _tolerance(bench))
    row = bench.add(SECTION, name, "tokens/s", outcome)
    if row.times_better is not None:
        bench.add_figure(SECTION, f"{name}, ours / GPT", "times", row.times_better, crowd.speedup)


class Variant(NamedTuple):
    """Weights and code of both models on the CPU.

    Attributes:
        precision: precision of the weights.
        compiles: steps are compiled.
    """

    precision: Precision = "full"
    compiles: bool = False

    def __str__(self) -> str:
        weights = "" if self.precision == "full" else f" in {self.precision}"
        return f"{weights}, compiled" if self.compiles else weights


PLAIN = Variant()
"""Weights in the dtype of the benchmark, and steps as they are."""


def _generation(
    bench: Bench,
    case: Case,
    count: int,
    states: dict[int, Phase2State],
    peers: dict[str, Callable[[], float]],
    variant: Variant = PLAIN,
) -> Outcome:
    """Measure generation after ``count`` tokens, whose state is in ``states`` or is read first."""

    def ours(check: Check) -> float:
        model, prompt = _model(bench, case.preset, variant.precision), _tokens(bench, case.preset, 1)
        if variant.compiles:
            model.compile_steps()
        if count not in states:
            _, _, states[count] = read(model, _tokens(bench, case.preset, count))
        check(regret(model, _exact_model(bench, case.preset), states[count], prompt))
        stream = model.stream(prompt, _WARM_UP + case.generated, temperature=0, state=states[count])
        return _speed(lambda: next(stream), case.generated, bench.device)

    name = f"{case.preset}{variant} generates after {count:,} tokens"
    return bench.measure(name, ours, peers, tolerance=2 * _tolerance(bench, variant.precision))


def _add_generation(bench: Bench, case: Case, count: int, outcome: Outcome, variant: Variant = PLAIN) -> None:
    """Measure the speed of generation; every token reads all weights."""
    parameters = training.multiplied_parameters(case.preset)
    work = Work(parameters * (bench.dtype.itemsize if variant.precision == "full" else 1), 2 * parameters)
    seconds = 1 / outcome.ours if outcome.ours else None
    name = f"{case.preset}{variant}, B1, generating after {count:,} tokens"
    row = bench.add(SECTION, name, "tokens/s", outcome, target=case.speed, work=work, seconds=seconds)
    target = case.speedup_many if count == case.many and case.speedup_many is not None else case.speedup
    if row.times_better is not None and target is not None and (variant.compiles or bench.device.type == "cuda"):
        name = f"{name}, ours / GPT after {case.context or count:,}"
        bench.add_figure(SECTION, name, "times", row.times_better, target)


def read(model: Phase2IntegratedModel, ids: Tensor) -> tuple[float, float, Phase2State]:
    """Read tokens (1, N) for the logits of the last; return tokens per second, peak GiB (0 except on CUDA), state."""
    piece = piece_length(1, model.d_model, ids.device)
    # One-time preparations for a piece of a fresh start, for one after it, and for the remainder.
    model.read(ids[:, : 2 * piece + ids.size(1) % piece])
    synchronize(ids.device)
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    _, state = model.read(ids)
    synchronize(ids.device)
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() / 2**30 if ids.device.type == "cuda" else 0.0
    return ids.size(1) / seconds, memory, state


@torch.inference_mode()
def reading_error(model: Phase2IntegratedModel, exact: Phase2IntegratedModel, ids: Tensor) -> float:
    """Return the relative error of logits behind pieces of tokens (1, N) to one pass of the float64 model."""
    state, found, ends = None, [], []
    for part in ids.split(ids.size(1) // 3, dim=1):
        logits, state = model.read(part, state=state)
        found.append(logits)
        ends.append(part.size(1) + (ends[-1] if ends else -1))
    return relative_error([torch.stack(found, dim=1)], [exact(ids)[:, ends]])


@torch.inference_mode()
def regret(model: Phase2IntegratedModel, exact: Phase2IntegratedModel, state: Phase2State, ids: Tensor) -> float:
    """Return the largest regret of greedy decoding.

    Where a float64 model prefers another token, the regret is the difference of the two logits, relative to the
    standard deviation of all logits at that position.

    Args:
        model: the model that generates.
        exact: the same model in float64.
        state: state before the prompt.
        ids: prompt (1, N).
    """
    new = torch.stack(list(model.stream(ids, _CHECKED, temperature=0, state=state)), dim=1)
    wide = state.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float64)) if _is_floating(x) else x)
    logits = exact(torch.cat([ids, new[:, :-1]], dim=1), state=wide)[:, ids.size(1) - 1 :]
    lost = logits.amax(-1) - logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    return greatest((lost / logits.std(-1)).flatten().tolist())


def _is_floating(x: Tensor) -> bool:
    """Return True for a real or complex floating-point tensor."""
    return x.is_floating_point() or x.is_complex()


def _transformers(bench: Bench, case: Case, context: int, variant: Variant = PLAIN) -> dict[str, Callable[[], float]]:
    """Return the Transformers to measure beside our model: on the CPU one whose step is as ours."""
    speed = partial(_transformer_speed, bench, case, context, variant.precision)
    if bench.device.type == "cuda":
        return _captured(bench, speed)
    return {"GPT, compiled" if variant.compiles else "GPT": lambda: speed(variant.compiles)}


def _captured(bench: Bench, speed: Callable[[bool], float]) -> dict[str, Callable[[], float]]:
    """Return the Transformers to measure on CUDA, given a function of whether their step is compiled."""
    peers = {"GPT, graph": lambda: speed(False)}
    if bench.scale != "quick":
        peers["GPT, compiled graph"] = lambda: speed(True)
    return peers


@torch.inference_mode()
def _transformer_speed(bench: Bench, case: Case, context: int, precision: Precision, compiles: bool) -> float:
    """Return tokens per second of greedy decoding on the device with a full cache."""
    torch.manual_seed(0)
    gpt = GPT.like(training.configuration(case.preset)).to(bench.device, bench.dtype).eval()
    prepare_weights(gpt, precision)
    cache = gpt.new_cache(1, context)
    for part in _tokens(bench, case.preset, context).split(case.piece, dim=1):
        gpt(part, cache=cache)
    return _ring_speed(bench, gpt, cache, 1, case.generated, compiles)


@dataclass(frozen=True)
class _RingStep:
    """Step of greedy decoding: a Transformer with its ring buffer, and the token that it reads next, (B, 1)."""

    gpt: GPT
    ring: RingCache
    token: Tensor

    def step(self) -> None:
        """Read the token, and put the likeliest next one in its place."""
        self.token.copy_(self.gpt(self.token, cache=self.ring)[:, -1].argmax(-1, keepdim=True))


@torch.inference_mode()
def _ring_speed(bench: Bench, gpt: GPT, cache: KVCache, sequences: int, count: int, compiles: bool) -> float:
    """Return steps per second of greedy decoding that goes on from a full cache."""
    ring, token = gpt.new_ring(cache), torch.zeros(sequences, 1, dtype=torch.int64, device=bench.device)
    cache.keys = cache.values = cache.keys[:0]  # the ring has a copy

    step = _RingStep(gpt, ring, token)
    run = partial(compiled(_RingStep.step), step) if compiles else step.step
    if bench.device.type == "cuda":
        run = capture([run]).replay
    return _speed(run, count, bench.device)


def _speed(step: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return steps per second, after a warm-up."""
    for _ in range(_WARM_UP):
        step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return count / (time.perf_counter() - started)


def _model(bench: Bench, preset: str, precision: Precision = "full") -> Phase2IntegratedModel:
    return prepare_weights(training.new_model(preset, bench.device).to(bench.dtype).eval(), precision)


def _exact_model(bench: Bench, preset: str) -> Phase2IntegratedModel:
    """Return the same model with the torch operators, in float64."""
    return training.new_model(preset, bench.device, backend="torch").to(bench.dtype).double().eval()


def _tokens(bench: Bench, preset: str, count: int, sequences: int = 1) -> Tensor:
    """Return random tokens (sequences, count) of a fixed seed."""
    torch.manual_seed(0)
    return torch.randint(training.configuration(preset).vocab_size, (sequences, count), device=bench.device)


def _tolerance(bench: Bench, precision: Precision = "full") -> float:
    """Return the tolerance of logits, relative to float64."""
    return 5e-2 if bench.dtype == torch.bfloat16 or precision == "int8" else 1e-4
