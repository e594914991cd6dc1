"""Numbers at the ends of their range: the bounds hold, and a gradient is finite where float64 has a finite one."""

import math

import pytest
import torch
from torch.nn import functional as F

from resolvent.layers import DissipativeBKLayer, LyapunovStabilityMonitor, NonHermitianPotential
from resolvent.layers.zeta import resonance_basis
from resolvent.ops import (
    Consolidation,
    Resonance,
    SNRFilter,
    dissipative_memory,
    effective_diagonal,
    resolvent_diagonal,
)
from tests.models.small import PHASE1, PHASE2

GPU = pytest.mark.gpu
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PLACES = [
    pytest.param("cpu", "torch", id="torch"),
    pytest.param("cpu", "triton", marks=[INTERPRETED, pytest.mark.slow], id="triton-interpreted"),
    pytest.param("cuda", "torch", marks=GPU, id="torch-cuda"),
    pytest.param("cuda", "triton", marks=GPU, id="triton-cuda"),
]
FLOAT32 = torch.finfo(torch.float32).max


def assert_finite_as(found, exact):
    """Every gradient is finite where that of float64 is, and is a number of float32."""
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.cpu().isfinite() | ~(theirs.abs() < FLOAT32)).all()


# ---------------------------------------------------------------------------------------------------- the resolvent

POTENTIALS = {
    "huge": lambda n: 1e30 * signs(n),
    "tiny": lambda n: 1e-30 * signs(n),
    "of all sizes": lambda n: signs(n) * 10 ** (60 * torch.rand(n, dtype=torch.float64) - 30),
    "huge and tiny in turn": lambda n: torch.tensor([1e30, -1e-30], dtype=torch.float64).repeat(n)[:n],
    "zero": lambda n: torch.zeros(n, dtype=torch.float64),
    "inside the band": lambda n: torch.ones(n, dtype=torch.float64),
    "at the edge of the band": lambda n: torch.full((n,), 2.0, dtype=torch.float64),
    "random": lambda n: 1.5 * torch.randn(n, dtype=torch.float64),
}
DAMPINGS = [(1e-3, 0.0), (1e-3, 1e-6), (0.5, 1e-6), (1e-3, 1e6), (1e6, 1e6)]
"""ζ and Γ; ``κ = 1``."""


def signs(n):
    return torch.randint(0, 2, (n,)).double() * 2 - 1


def scattered(potential, zeta, gamma, dtype, device="cpu", backend="torch", form="causal"):
    """The diagonal, and the gradients of V, Γ, κ, E, ζ and of the coupling."""
    values = [potential.view(1, -1, 1), torch.full_like(potential, gamma).view(1, -1, 1)]
    values += [torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.0, zeta, 1.0)]
    *physical, coupling = (x.to(device, dtype).requires_grad_() for x in values)
    g, _ = resolvent_diagonal(effective_diagonal(*physical), coupling, form=form, backend=backend)
    weights = torch.cos(torch.arange(2 * len(potential), device=device)).view(1, -1, 1, 2)
    grads = torch.autograd.grad((torch.view_as_real(g) * weights.to(dtype)).sum(), (*physical, coupling))
    return g.detach().cpu(), grads


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("form", ["causal", "two_sided"])
@pytest.mark.parametrize("kind", POTENTIALS)
def test_the_resolvent_is_bounded(kind, form, device, backend):
    for length in (1, 2, 300) if (device, backend) != ("cpu", "triton") else (70,):
        potential = POTENTIALS[kind](length)
        for zeta, gamma in DAMPINGS:
            g, grads = scattered(potential, zeta, gamma, torch.float32, device, backend, form)
            exact, exact_grads = scattered(potential, zeta, gamma, torch.float64, form=form)
            assert torch.view_as_real(g).isfinite().all()
            assert (g.abs() * (gamma + zeta)).max() <= 1 + 1e-6
            assert (g - exact).norm() <= 1e-3 * exact.norm()  # float32 at ζ = 0.001
            assert all(x.isfinite().all() for x in exact_grads)
            assert_finite_as(grads, exact_grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["of all sizes", "inside the band", "random"])
def test_a_million_sites(kind, device):
    potential = POTENTIALS[kind](1_000_000)
    g, grads = scattered(potential, 1e-3, 1e-6, torch.float32, device, "auto")
    exact, _ = scattered(potential, 1e-3, 1e-6, torch.float64)
    assert g.abs().max() * (1e-3 + 1e-6) <= 1 + 1e-6
    # An error of δ in the denominator of g = 1 / (α - m g') counts |g| δ, and next to a pole |g| is 1 / ζ.
    assert (g - exact).norm() <= 8 * torch.finfo(torch.float32).eps * exact.abs().max() * exact.norm()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("rate", [1e-6, 1e6])
def test_a_layer_with_extreme_weights_is_bounded(size, rate, autocast, device):
    """Weights of ``size`` make the potential; the bias makes Γ of ``rate`` (or ``least_decay``)."""

    def run(dtype, autocast, device):
        layer = DissipativeBKLayer(NonHermitianPotential(16, 3, least_decay=1e-6)).to(device, dtype)
        with torch.no_grad():
            layer.log_zeta.fill_(math.log(1e-3))
            layer.potential.v_proj.weight.copy_(size * directions)
            layer.potential.gamma_proj.weight.zero_()
            layer.potential.gamma_bias.fill_(rate if rate > 1 else -100.0)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            features, gamma, _ = layer(x.to(device, dtype))
        grads = torch.autograd.grad(features.double().square().sum() + features.double().sum(), layer.parameters())
        return features.detach().double().cpu(), gamma.detach().double().cpu(), grads

    directions, x = torch.randn(3, 16, dtype=torch.float64), torch.randn(2, 100, 16, dtype=torch.float64)
    features, gamma, grads = run(torch.float32, autocast, device)
    _, _, exact = run(torch.float64, False, "cpu")
    size_of_g = features.unflatten(-1, (2, 3)).norm(dim=-2)
    assert (size_of_g * (gamma + 1e-3)).max() <= 1 + 1e-6
    assert all(x.isfinite().all() for x in exact)
    assert_finite_as(grads, exact)


# ------------------------------------------------------------------------------------------------------- the memory

WIDTH, ETA, BOOST, STRENGTH = 16, 0.1, 1.5, 0.9
DECAYS = {
    "1e-6": lambda n: torch.full((1, n, 2), 1e-6, dtype=torch.float64),
    "1": lambda n: torch.ones(1, n, 2, dtype=torch.float64),
    "1e6": lambda n: torch.full((1, n, 2), 1e6, dtype=torch.float64),
    "1e-6 and 1e6": lambda n: torch.where(torch.arange(n).view(1, n, 1) % 7 == 0, 1e6, 1e-6).double().repeat(1, 1, 2),
}
TOKENS = ["random", "all equal", "zero queries and keys", "zero values", "huge values", "tiny values"]


def written(kind, length):
    """Queries, keys and values, float64 (1, N, 2, K)."""
    q, k, v = torch.randn(3, 1, length, 2, WIDTH, dtype=torch.float64)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if kind == "all equal":
        q, k, v = (x[:, :1].expand_as(x).contiguous() for x in (k, k, v))
    if kind == "zero queries and keys":
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    return q, k, v * {"zero values": 0.0, "huge values": 1e15, "tiny values": 1e-15}.get(kind, 1.0)


def remembered(q, k, v, decay, dtype, wide, device="cpu", backend="torch"):
    """The final state and all gradients; ``wide`` is the dtype of decays and parameters."""
    tokens = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    given = [decay, torch.full((2,), ETA), torch.full((2,), STRENGTH), torch.ones(2), torch.full((2,), 4.0)]
    decay, eta, strength, sharpness, bias = (x.to(device, wide).requires_grad_() for x in given)
    basis = resonance_basis(WIDTH).to(device)
    rule = Consolidation(64, SNRFilter(2.0, 0.5, 2.0, BOOST, strength), Resonance(basis, 0.1, sharpness, bias))
    readout, state = dissipative_memory(*tokens, decay, eta, consolidation=rule, backend=backend)
    weights = torch.cos(torch.arange(readout.numel(), device=device)).view(readout.shape)
    loss = (readout.double() * weights).sum() + state.memory.double().sum()
    sources = (*tokens, decay, eta, *rule.parameters)
    return readout.detach(), state, torch.autograd.grad(loss, sources, materialize_grads=True)


def assert_memory_is_bounded(kind, decay, dtype, device, backend):
    q, k, v = (x.to(dtype).double() for x in written(kind, decay.shape[1]))
    decay = decay.float().double()
    readout, state, grads = remembered(q, k, v, decay, dtype, torch.float32, device, backend)
    _, _, exact = remembered(q, k, v, decay, torch.float64, torch.float64)
    assert all(x.isfinite().all() for x in (readout, *state))
    largest, least = ETA * v.norm(dim=-1).amax(1), decay.amin(1)
    energy = state.memory.detach().double().square().sum((-2, -1)).cpu()
    amplification = torch.tensor(1 / (1 - STRENGTH * (1 - 1 / BOOST)))
    bound = LyapunovStabilityMonitor.bound(torch.zeros_like(largest), largest, least, amplification)
    assert (energy <= bound * 1.00001).all()
    assert all(x.isfinite().all() for x in exact)
    assert_finite_as(grads, exact)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("strength", DECAYS)
@pytest.mark.parametrize("kind", TOKENS)
def test_the_memory_is_bounded(kind, strength, device, backend):
    for length in (1, 63, 64, 1000) if (device, backend) != ("cpu", "triton") else (130,):
        assert_memory_is_bounded(kind, DECAYS[strength](length), torch.float32, device, backend)


@pytest.mark.parametrize(
    ("device", "backend"), [place for place in PLACES if place.id != "triton-interpreted"]
)  # the interpreter has no products of bfloat16
@pytest.mark.parametrize("strength", DECAYS)
@pytest.mark.parametrize("kind", TOKENS)
def test_the_memory_is_bounded_in_bfloat16(kind, strength, device, backend):
    for length in (1, 130):
        assert_memory_is_bounded(kind, DECAYS[strength](length), torch.bfloat16, device, backend)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["all equal"])
def test_the_memory_of_a_million_tokens_is_bounded(kind, device):
    assert_memory_is_bounded(kind, DECAYS["1e-6"](1_000_000), torch.float32, device, "auto")


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_a_learning_rate_that_underflows_leaves_gradients_finite(device, backend):
    q, k, v = (x.to(device, torch.float32).requires_grad_() for x in written("random", 70))
    log_eta = torch.full((2,), -200.0, device=device, requires_grad=True)
    decay = torch.full((1, 70, 2), 0.1, device=device, requires_grad=True)
    readout, state = dissipative_memory(q, k, v, decay, log_eta.exp(), backend=backend)
    grads = torch.autograd.grad(readout.sum() + state.memory.sum(), (q, k, v, decay, log_eta))
    assert not readout.any()
    assert not any(grad.any() for grad in grads)


# ------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("phase", [PHASE1, PHASE2], ids=["phase1", "phase2"])
@pytest.mark.parametrize("length", [1, 2, 65, 1000])
def test_a_model_reads_equal_tokens(length, phase, autocast, device):
    model = phase.model().to(device)
    ids = torch.full((2, length), 7, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        model(ids, labels=ids).backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-30, 1e4, 1e5])  # the square of what three of 1e6 make is no float32
@torch.no_grad()
def test_a_model_of_any_matrices_keeps_its_bound(size, autocast, device):
    model = PHASE2.model().to(device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter *= size
    ids = torch.randint(97, (2, 300), device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        logits, diagnostics = model(ids, return_diagnostics=True)
    assert logits.isfinite().all()
    for stability in diagnostics["stability_metrics"]:
        assert (stability["energy"] <= stability["energy_bound"] * 1.0001).all()
