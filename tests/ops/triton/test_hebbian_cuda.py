"""The memory's kernels on the GPU: every gradient against float64, in float32 and bfloat16."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from resolvent.ops import Consolidation, MemoryState, Resonance, SNRFilter, dissipative_memory

pytest.importorskip("triton")
from resolvent.ops.triton import hebbian_kernels as kernels
from resolvent.ops.triton import segments

pytestmark = pytest.mark.gpu

DECAYS = {"weak": 1e-3, "middling": 0.3, "strong": 1000.0}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
ROUNDINGS = 8
"""Random roundings of the operands, from which the error of rounding in a sum that cancels is estimated."""


def inputs(length, strength=0.3, batch=2, heads=2, width=64):
    draw = {"device": "cuda", "dtype": torch.float64}
    q, k = (F.normalize(torch.randn(batch, length, heads, width, **draw), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, width, **draw)
    return [q, k, v, strength * torch.rand(batch, length, heads, **draw), torch.rand(heads, **draw) + 0.1]


def state(batch=2, heads=2, width=64):
    draw = {"device": "cuda", "dtype": torch.float64}
    return MemoryState(torch.randn(batch, heads, width, width, **draw), torch.rand(batch, heads, **draw))


KINDS = ["none", "snr", "strength", "resonance", "both"]
"""Nothing, the SNR filter at full strength and at a strength of its own, the resonance, and the last two."""


def consolidation(kind, interval=64, heads=2, width=64):
    if kind == "none":
        return None
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0].cuda()
    draw = {"device": "cuda", "dtype": torch.float64}
    strength, sharpness, bias = (torch.rand(heads, **draw).requires_grad_() for _ in range(3))
    snr = SNRFilter(2.0, 0.5, 2.0, 1.5, None if kind == "snr" else strength) if kind != "resonance" else None
    resonance = Resonance(basis, 0.1, sharpness, bias) if kind in ("resonance", "both") else None
    return Consolidation(interval, snr, resonance)


def cast(rule, dtype):
    if rule is None:
        return rule

    def casted(part, *names):
        given = {name: getattr(part, name) for name in names if getattr(part, name) is not None}
        return replace(part, **{k: x.detach().to(dtype).requires_grad_(k != "basis") for k, x in given.items()})

    snr = casted(rule.snr, "strength") if rule.snr else None
    resonance = casted(rule.resonance, "basis", "sharpness", "bias") if rule.resonance else None
    return replace(rule, snr=snr, resonance=resonance)


def run(values, start, rule, position, offsets, backend, of_operands=lambda x: x):
    """Read-out, final state and the gradients of everything, from a loss that looks at both.

    ``of_operands`` is applied to q, k and the gradient of the read-out.
    """
    q, k, *others = values
    readout, final = dissipative_memory(
        of_operands(q),
        of_operands(k),
        *others,
        initial_state=start,
        position=position,
        cu_seqlens=offsets,
        consolidation=rule,
        backend=backend,
    )
    weights = torch.cos(torch.arange(readout.numel(), dtype=torch.float64, device=readout.device)).view_as(readout)
    loss = (readout.double() * of_operands(weights)).sum() + sum(x.double().square().sum() for x in final)
    sources = [*values, *(start or ()), *(rule.parameters if rule else ())]
    return [readout, *final, *torch.autograd.grad(loss, sources, materialize_grads=True)]


def rounded(x):
    """Round x as the kernels round the operands of products: times a factor of its token's, to bfloat16."""
    factor = 0.5 + 0.5 * torch.rand_like(x[..., :1])
    return (x * factor).detach().bfloat16().to(x.dtype) / factor + (x - x.detach())


def errors_of_rounding(expected, *arguments):
    """Root mean square of what rounded operands change of ``run`` in float64."""
    changes = torch.zeros(len(expected), dtype=torch.float64)
    for _ in range(ROUNDINGS):
        found = run(*arguments, "torch", rounded)
        changes += torch.stack([(a - b).square().sum().cpu() for a, b in zip(found, expected, strict=True)])
    return (changes / ROUNDINGS).sqrt().tolist()


def errors_and_bounds(dtype, values, start=None, rule=None, position=None, offsets=None):
    """Results of the kernels, and of all of them the error and its bound.

    The bound of a result is a share of its norm. A gradient that cancels out is as exact as its terms: no bound is
    below a thousandth of the largest norm. The gradient of a filter's parameter is a sum over all boundaries and cells
    of the memory, whose terms add up to about a hundred times its norm. In bfloat16 its bound is at least four times
    what random roundings of the products' operands change in float64.
    """
    # What float64 reads is what half precision was given.
    values = [x.to(dtype) for x in values[:3]] + [x.float() for x in values[3:]]
    narrow = [x.detach().requires_grad_() for x in values]
    exact = [x.detach().double().requires_grad_() for x in values]
    narrow_start = MemoryState(*(x.float().requires_grad_() for x in start)) if start else None
    exact_start = MemoryState(*(x.detach().double().requires_grad_() for x in narrow_start)) if narrow_start else None
    narrow_rule = cast(rule, torch.float32)
    exact_arguments = (exact, exact_start, cast(narrow_rule, torch.float64), position, offsets)
    expected = run(*exact_arguments, "torch")
    found = run(narrow, narrow_start, narrow_rule, position, offsets, "triton")
    again = run(narrow, narrow_start, narrow_rule, position, offsets, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

    errors = [(a.double() - b).norm().item() for a, b in zip(found, expected, strict=True)]
    scale = max(x.norm().item() for x in expected)
    bounds = [TOLERANCE[dtype] * max(x.norm().item(), 1e-3 * scale) for x in expected]
    parameters = len(rule.parameters) if rule else 0
    if parameters and dtype == torch.bfloat16:
        of_rounding = errors_of_rounding(expected, *exact_arguments)[-parameters:]
        bounds[-parameters:] = [max(a, 4 * b) for a, b in zip(bounds[-parameters:], of_rounding, strict=True)]
    return found, errors, bounds


def check(*arguments):
    found, errors, bounds = errors_and_bounds(*arguments)
    assert all(x.isfinite().all() for x in found)
    for i, (error, bound) in enumerate(zip(errors, bounds, strict=True)):
        assert error <= bound, i


@pytest.fixture(autouse=True)
def _poison_memory(monkeypatch):
    """Free memory is full of NaN before every kernel: an unwritten output shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_lengths(length, kind, dtype):
    check(dtype, inputs(length), state(), consolidation(kind), torch.tensor([0, 37]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("strength", ["weak", "strong"])
@pytest.mark.parametrize("kind", ["none", "both"])
def test_decays(kind, strength, dtype):
    check(dtype, inputs(1000, DECAYS[strength]), None, consolidation(kind))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [16, 32, 128])
def test_widths(width, dtype):
    check(dtype, inputs(200, width=width), state(width=width), consolidation("both", width=width))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_intervals(dtype):
    check(dtype, inputs(500), state(), consolidation("both", interval=128), torch.tensor([100, 0]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["none", "both"])
def test_packed_sequences(kind, dtype):
    offsets = torch.tensor([0, 0, 5, 69, 70, 1000, 2000])
    check(dtype, inputs(2000, batch=1), state(batch=6), consolidation(kind), torch.arange(6) * 50, offsets)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_segments(dtype):
    values = inputs(4000, 0.05)
    assert segments.layout_of(values[0], None, None, 0).segmented
    check(dtype, values, state())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("interval", [64, 256])
@pytest.mark.parametrize("kind", ["strength", "both"])
def test_segments_with_consolidation(kind, interval, dtype):
    values, position = inputs(2000, 0.05), torch.tensor([0, 100])
    assert segments.layout_of(values[0], position, None, interval).segmented
    check(dtype, values, state(), consolidation(kind, interval), position)


@pytest.mark.parametrize("width", [16, 128])
def test_segments_with_consolidation_of_any_width(width):
    values = inputs(1000, 0.05, width=width)
    check(torch.float32, values, state(width=width), consolidation("both", 128, width=width), torch.tensor([70, 0]))


def test_another_length_needs_no_new_kernel():
    def sizes():
        of_device = [kernel.device_caches[torch.cuda.current_device()] for kernel in (kernels.walk, kernels.walk_back)]
        return [len(caches[0]) for caches in of_device]

    for length in (200, 333, 500, 77):
        check(torch.bfloat16, inputs(length), state(), consolidation("both"), torch.tensor([0, 5]))
        if length == 200:
            first = sizes()
    assert sizes() == first
