"""The kernels of the gated read-out: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch

from resolvent.ops.gated_readout import gated_readout

from ..test_gated_readout import inputs

pytest.importorskip("triton")
from resolvent.ops.triton.gated_readout import _BACKWARD

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
PROGRAM = _BACKWARD["TOKENS"]
NAMES = ["normalized", "gated", "of readout", "of opening", "of bias", "of features"]


def run(given, backend, fed_back=True):
    """Everything that is computed, gradients of a loss that looks at all of it included."""
    sources = [x.detach().requires_grad_() for x in given]
    outputs = gated_readout(*sources, backend)
    seen = outputs if fed_back else outputs[1:]
    loss = sum(
        (x.double() * torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device)).view_as(x)).sum()
        for x in seen
    )
    return [*outputs, *torch.autograd.grad(loss, sources, materialize_grads=True)]


def check(given, device, dtype, tolerance, fed_back=True):
    expected = run(given, "torch", fed_back)
    readout, opening, bias, features = (x.to(device) for x in given)
    narrow = (readout.to(dtype), opening.to(dtype), bias.float(), features.float())
    found = run(narrow, "triton", fed_back)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert a.shape == b.shape and (a.cpu().double() - b).norm() <= tolerance * b.norm(), name
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, PROGRAM - 1, PROGRAM + 1])
def test_kernels_are_the_reference_gradients_included(device, length):
    check(inputs(length), device, torch.float32, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "width", "features"), [(3, 8, 6), (1, 16, 0), (5, 24, 1)])
def test_any_number_of_heads_and_features(device, heads, width, features):
    check(inputs(20, heads, width, features), device, torch.float32, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_normalised_readout_that_nothing_reads_has_no_gradient(device):
    check(inputs(20), device, torch.float32, 1e-5, fed_back=False)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_gradient_may_have_gaps(device):
    given = [x.to(device, torch.float32) for x in inputs(20)]
    normalized, gated, inverse_rms = torch.ops.resolvent.gated_readout.default(*given)
    grad = torch.randn(*gated.shape[:2], gated.shape[2] + 3, device=device)[..., :-3]
    run = torch.ops.resolvent.gated_readout_backward.default
    found, expected = (run(None, x, normalized, inverse_rms, *given[1:]) for x in (grad, grad.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_keep_the_rules_of_torch_library(device):
    given = [x.to(device, torch.float32).requires_grad_() for x in inputs(5)]
    torch.library.opcheck(torch.ops.resolvent.gated_readout.default, given)
    normalized, gated, inverse_rms = (x.detach() for x in torch.ops.resolvent.gated_readout.default(*given))
    _, opening, bias, features = (x.detach() for x in given)
    operands = (torch.randn_like(normalized), torch.randn_like(gated), normalized, inverse_rms, opening, bias, features)
    torch.library.opcheck(torch.ops.resolvent.gated_readout_backward.default, operands)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_bfloat16_on_the_gpu(length):
    readout, opening, bias, features = inputs(length, heads=8, width=64, features=16)
    given = readout.bfloat16().double(), opening.bfloat16().double(), bias, features
    one, two = (check(given, "cuda", torch.bfloat16, 5e-3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
