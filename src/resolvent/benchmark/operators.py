"""Speed of the operators: dissipative memory, diagonal of the resolvent, and loss.

Shapes: B batch, N sequence, H heads, K key and value width, T tokens, D width, V vocabulary.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resolvent.benchmark.harness import Bench, Check, Measurement, Scale
from resolvent.benchmark.report import Row, Target
from resolvent.benchmark.timing import Job, Work, greatest, milliseconds, relative_error
from resolvent.layers import MemoryResonanceLayer, SNRMemoryFilter
from resolvent.models.phase2 import Phase2Config
from resolvent.ops import (
    Consolidation,
    dissipative_memory,
    dissipative_memory_reference,
    linear_cross_entropy,
    resolvent_diagonal,
    resolvent_diagonal_reference,
    resolvent_step,
)
from resolvent.ops.hebbian import CHUNK

SECTION = "operators"
_DENSE_SITES = 48
"""Sites of the chains that are compared with dense inverses."""


def measurements(scale: Scale) -> list[Measurement]:
    """Return a measurement of every operator at every size of a scale."""
    return [
        *(Measurement(SECTION, str(case), partial(_measure_memory, case=case)) for case in MEMORY[scale]),
        *(Measurement(SECTION, str(case), partial(measure_resolvent, case=case)) for case in RESOLVENT[scale]),
        *(Measurement(SECTION, str(case), partial(measure_loss, case=case)) for case in LOSS[scale]),
    ]


def _measure_memory(bench: Bench, case: "MemoryCase") -> None:
    """Measure a case; compare one with consolidation with the same without, if that was measured before."""
    row = measure_memory(bench, case)
    before = bench.find(SECTION, str(dataclasses.replace(case, consolidated=False))) if case.consolidated else None
    if row.ours is not None and before is not None and before.ours is not None:
        name = f"memory {needs(case)}, consolidated / not"
        target = Target(1.05, 1.1) if case.backward else Target(1.3, 1.6)
        bench.add_figure(SECTION, name, "times", row.ours / before.ours, target if bench.scale == "cuda" else None)


def needs(case: "MemoryCase | ResolventCase") -> str:
    return "forward + backward" if case.backward else "forward"


# ------------------------------------------------------------------------------------------------------ the memory


@dataclass(frozen=True)
class MemoryCase:
    """Case of a call of ``dissipative_memory``.

    ``checked`` tokens, including a consolidation, are compared with the reference.
    """

    batch: int
    length: int
    heads: int
    width: int
    backward: bool = False
    consolidated: bool = False
    target: Target | None = None
    checked: int = Phase2Config.consolidation_interval + CHUNK + 3

    def __str__(self) -> str:
        mechanisms = ", consolidated" if self.consolidated else ""
        return f"memory {needs(self)}{mechanisms}, B{self.batch} N{self.length} H{self.heads} K{self.width}"


_SHAPE = (8, 2048, 16, 64)
# Each case with consolidation follows the same one without.
MEMORY = {
    "cuda": (
        MemoryCase(*_SHAPE, target=Target(0.055, 0.09)),
        MemoryCase(*_SHAPE, consolidated=True),
        MemoryCase(*_SHAPE, backward=True, target=Target(0.25, 0.40)),
        MemoryCase(*_SHAPE, backward=True, consolidated=True),
        MemoryCase(1, 131_072, 8, 64, target=Target(0.4, 1.0), checked=4096 + 5),
    ),
    "cpu": (
        MemoryCase(1, 1024, 8, 64),
        MemoryCase(1, 1024, 8, 64, consolidated=True),
        MemoryCase(1, 1024, 8, 64, backward=True),
        MemoryCase(1, 1024, 8, 64, backward=True, consolidated=True),
    ),
    "quick": (
        MemoryCase(1, 330, 2, 16),
        MemoryCase(1, 330, 2, 16, backward=True),
        MemoryCase(1, 330, 2, 16, backward=True, consolidated=True),
    ),
}


def measure_memory(bench: Bench, case: MemoryCase) -> Row:
    memory, work = memory_operator(case, bench.device), memory_work(case, bench.dtype)

    def ours() -> Job:
        return _job(case.backward, memory, memory_inputs(case, bench.device, bench.dtype))

    def sdpa() -> Job:
        q, k, v, *_ = memory_inputs(case, bench.device, bench.dtype)
        heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        return _job(case.backward, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads_first)

    def simple_gla() -> Job:
        chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        q, k, v, decay, _ = memory_inputs(case, bench.device, bench.dtype)
        return _job(case.backward, lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0], (q, k, v, -decay))

    peers_by_name = {"SDPA": sdpa}
    if bench.device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        peers_by_name["FLA simple_gla"] = simple_gla
    timed = {name: _timed(bench, make, work.num_bytes) for name, make in peers_by_name.items()}
    outcome = bench.measure(
        str(case),
        _checked(lambda: memory_error(case, bench.device, bench.dtype), _timed(bench, ours, work.num_bytes)),
        timed,
        tolerance=5e-3 if bench.dtype == torch.bfloat16 else 1e-4,
    )
    return bench.add(SECTION, str(case), "ms", outcome, target=case.target, work=work)


def memory_operator(case: MemoryCase, device: torch.device) -> Callable[..., Tensor]:
    """Return the public operator: (q, k, v, decay, eta[, strength, sharpness, bias]) -> read-out."""
    consolidation = _consolidation(case, device) if case.consolidated else None

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor, *parameters: Tensor) -> Tensor:
        return dissipative_memory(q, k, v, decay, eta, consolidation=_with(consolidation, parameters))[0]

    return run


def memory_inputs(case: MemoryCase, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return L2-normalised q and k, v, decays over 0.5 to hundreds of tokens, η, and the filters' parameters."""
    q, k, v = torch.randn(3, case.batch, case.length, case.heads, case.width, device=device)
    q, k, v = (x.to(dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))
    slowest_to_fastest = torch.logspace(-2.5, 0.0, case.heads, device=device)
    decay = slowest_to_fastest * (0.5 + torch.rand(case.batch, case.length, case.heads, device=device))
    inputs = [q, k, v, decay, torch.full((case.heads,), 0.1, device=device)]
    if case.consolidated:
        strength, sharpness, bias = torch.rand(3, case.heads, device=device)
        inputs += [strength, 1 + sharpness, bias]
    return inputs


def memory_error(case: MemoryCase, device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of the read-out, and of timed gradients, to the definition in float64.

    Batch and heads are those of the timed call, since their number selects the implementation.
    """
    short = dataclasses.replace(case, length=min(case.length, case.checked))
    return _error(
        case.backward, memory_operator(short, device), _memory_reference(short), memory_inputs(short, device, dtype)
    )


def memory_work(case: MemoryCase, dtype: torch.dtype) -> Work:
    """Return the least work of the memory, its products in chunks of 64 tokens.

    Forward reads q, k, v and the decay and writes the read-out; backward reads them and the read-out's gradient and
    writes the gradients.
    """
    tokens = case.batch * case.length * case.heads
    tensors, decays, products = (11, 3, 3) if case.backward else (4, 1, 1)
    flops = 2 * CHUNK * 2 * case.width + 4 * case.width**2
    return Work(tokens * (tensors * case.width * dtype.itemsize + decays * 4), products * tokens * flops)


def _memory_reference(case: MemoryCase) -> Callable[..., Tensor]:
    consolidation = _consolidation(case, torch.device("cpu")) if case.consolidated else None

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor, *parameters: Tensor) -> Tensor:
        exact = _with(consolidation, parameters)
        return dissipative_memory_reference(q, k, v, decay, eta, consolidation=exact)[0]

    return run


def _consolidation(case: MemoryCase, device: torch.device) -> Consolidation:
    """Return both mechanisms with the defaults of a model."""
    config = Phase2Config()
    snr = SNRMemoryFilter(
        case.heads, config.snr_threshold, config.snr_gamma_boost, config.snr_eta_boost, config.snr_temperature
    ).to(device)
    resonance = MemoryResonanceLayer(case.heads, case.width, config.resonance_energy_threshold).to(device)
    return Consolidation(config.consolidation_interval, snr(), resonance())


def _with(consolidation: Consolidation | None, parameters: tuple[Tensor, ...]) -> Consolidation | None:
    if consolidation is None or consolidation.snr is None or consolidation.resonance is None:
        return None
    strength, sharpness, bias = parameters
    snr = dataclasses.replace(consolidation.snr, strength=strength)
    resonance = dataclasses.replace(consolidation.resonance, sharpness=sharpness, bias=bias)
    return dataclasses.replace(consolidation, snr=snr, resonance=resonance)


# -------------------------------------------------------------------------------------------------- the resolvent


@dataclass(frozen=True)
class ResolventCase:
    """Case of a call of ``resolvent_diagonal``; ``checked`` sites are compared with the recurrence in complex128."""

    batch: int
    length: int
    heads: int
    backward: bool = False
    target: Target | None = None
    checked: int = 3000

    def __str__(self) -> str:
        return f"BK-Core {needs(self)}, B{self.batch} N{self.length} H{self.heads}"


RESOLVENT = {
    "cuda": (
        ResolventCase(64, 2048, 1, target=Target(0.010, 0.02)),
        ResolventCase(64, 2048, 1, backward=True, target=Target(0.030, 0.06)),
        ResolventCase(1, 2**20, 1, target=Target(0.1, 1.0), checked=20_000),
    ),
    "cpu": (ResolventCase(4, 1024, 1), ResolventCase(4, 1024, 1, backward=True)),
    "quick": (ResolventCase(1, 130, 2), ResolventCase(1, 130, 2, backward=True)),
}


def measure_resolvent(bench: Bench, case: ResolventCase) -> None:
    def entry(backend: str) -> Callable[[], Job]:
        def operator(alpha: Tensor, coupling: Tensor) -> Tensor:
            return resolvent_diagonal(alpha, coupling, backend=backend)[0]

        return lambda: _job(case.backward, operator, resolvent_inputs(case, bench.device))

    sites = case.batch * case.length * case.heads
    work = Work(sites * (5 if case.backward else 2) * 8)
    peers = {"torch": _timed(bench, entry("torch"), work.num_bytes)} if bench.device.type == "cuda" else {}
    outcome = bench.measure(
        str(case),
        _checked(lambda: resolvent_error(case, bench.device), _timed(bench, entry("auto"), work.num_bytes)),
        peers,
        tolerance=1e-4 if case.backward else 1e-5,
    )
    row = bench.add(SECTION, str(case), "ms", outcome, target=case.target, work=work)
    if row.times_better is not None:
        target = Target(Phase2Config().target_speedup_triton, at_most=False)
        bench.rows.append(
            Row(SECTION, f"BK-Core {needs(case)}, torch / kernel", "times", row.times_better, target=target)
        )


def resolvent_inputs(case: ResolventCase, device: torch.device) -> list[Tensor]:
    """Return a potential around zero, decays from strong to weak, and hoppings of one."""
    shape = (case.batch, case.length, case.heads)
    imaginary = -(0.1 + torch.rand(shape, device=device))
    return [torch.complex(torch.randn(shape, device=device), imaginary), torch.ones(case.heads, device=device)]


def resolvent_error(case: ResolventCase, device: torch.device) -> float:
    """Return the relative error to the dense inverse and, on a longer chain, the recurrence; with timed gradients."""

    def operator(alpha: Tensor, coupling: Tensor) -> Tensor:
        return resolvent_diagonal(alpha, coupling)[0]

    short = resolvent_inputs(dataclasses.replace(case, batch=1, length=min(case.length, _DENSE_SITES)), device)
    long = resolvent_inputs(dataclasses.replace(case, length=min(case.length, case.checked)), device)
    return greatest(
        [
            _error(case.backward, operator, resolvent_diagonal_reference, short),
            _error(case.backward, operator, _recurrence, long),
        ]
    )


def _recurrence(alpha: Tensor, coupling: Tensor) -> Tensor:
    """Compute the causal form, site by site."""
    state, sites = torch.zeros_like(alpha[:, 0]), []
    for site in alpha.unbind(1):
        state = resolvent_step(site, coupling, state)
        sites.append(state)
    return torch.stack(sites, dim=1)


# --------------------------------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class LossCase:
    """Case of a head with cross-entropy, forward and backward; ``checked`` tokens are compared with the reference."""

    tokens: int
    width: int
    vocabulary: int
    checked: int = 300

    def __str__(self) -> str:
        return f"head and loss forward + backward, T{self.tokens} D{self.width} V{self.vocabulary}"


LOSS = {
    "cuda": (LossCase(16_384, 512, 50_257),),
    "cpu": (LossCase(256, 512, 50_257, checked=30),),
    "quick": (LossCase(100, 32, 257),),
}


def measure_loss(bench: Bench, case: LossCase) -> None:
    def entry(loss: Callable[..., Tensor]) -> Callable[[], Job]:
        def make() -> Job:
            hidden, weight, labels = loss_inputs(case, bench.device)
            return _job(True, lambda hidden, weight: loss(hidden, weight, labels), (hidden, weight))

        return make

    def under_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype == torch.bfloat16):
                return loss(*inputs)

        return run

    def error() -> float:
        small = dataclasses.replace(case, tokens=min(case.tokens, case.checked))
        hidden, weight, labels = loss_inputs(small, bench.device)
        loss = under_autocast(partial(linear_cross_entropy, chunk_tokens=small.tokens // 3 + 1))
        return _error(
            True, lambda h, w: loss(h, w, labels), lambda h, w: cross_entropy(h, w, labels.cpu()), [hidden, weight]
        )

    # Weight in float32 and its half-precision copy, hidden states, and the gradients of both.
    work = Work(
        case.vocabulary * case.width * (4 + bench.dtype.itemsize + 4) + case.tokens * case.width * 8,
        6 * case.tokens * case.vocabulary * case.width,
    )
    plain = {"cross_entropy": cross_entropy}
    if bench.scale == "cuda":
        plain["compiled cross_entropy"] = torch.compile(cross_entropy, dynamic=False)
    peers = {name: _timed(bench, entry(under_autocast(loss)), work.num_bytes) for name, loss in plain.items()}
    outcome = bench.measure(
        str(case),
        _checked(error, _timed(bench, entry(under_autocast(linear_cross_entropy)), work.num_bytes)),
        peers,
        tolerance=5e-3 if bench.dtype == torch.bfloat16 else 1e-5,
    )
    bench.add(SECTION, str(case), "ms", outcome, work=work)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the plain loss, which holds all logits."""
    return F.cross_entropy((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)), labels)


def loss_inputs(case: LossCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 hidden states and a head with logits of standard deviation 2, and labels."""
    hidden = torch.randn(case.tokens, case.width, device=device)
    weight = torch.randn(case.vocabulary, case.width, device=device) * 2 * case.width**-0.5
    return hidden, weight, torch.randint(case.vocabulary, (case.tokens,), device=device)


# --------------------------------------------------------------------------------------------------- shared functions


def _timed(bench: Bench, make_job: Callable[[], Job], num_bytes: float) -> Callable[[], float]:
    return lambda: milliseconds(make_job, num_bytes, bench.device)


def _checked(error: Callable[[], float], measure: Callable[[], float]) -> Callable[[Check], float]:
    """Measure our operator after a check of its error."""

    def run(check: Check) -> float:
        check(error())
        return measure()

    return run


def _job(backward: bool, operator: Callable[..., Tensor], inputs: Any) -> Job:
    """Return a job: the operator on new inputs, with or without gradients."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return operator(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream: list[Tensor] = []

    def both() -> tuple[Tensor, ...]:
        output = operator(*leaves)
        if not upstream:
            upstream.append(torch.randn_like(output))
        return torch.autograd.grad(output, leaves, upstream[0])

    return both


def _exact(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs]


def _error(
    backward: bool, operator: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> float:
    """Return the relative error of the output, or the largest one of output and gradients."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    exact_leaves = [x.requires_grad_(backward) for x in _exact(inputs)]
    output, exact = operator(*leaves), reference(*exact_leaves)
    pairs = [(output, exact)]
    if backward:
        upstream = torch.randn_like(exact).to(output.dtype)
        found = torch.autograd.grad(output, leaves, upstream.to(output.device))
        pairs += zip(found, torch.autograd.grad(exact, exact_leaves, upstream.to(exact.dtype)), strict=True)
    return greatest([relative_error([a], [b]) for a, b in pairs])
