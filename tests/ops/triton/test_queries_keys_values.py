"""The kernels of the convolution before the memory: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch

from resolvent.ops.queries_keys_values import queries_keys_values

from ..test_queries_keys_values import HEADS, inputs

pytest.importorskip("triton")
from resolvent.ops.triton.queries_keys_values import _BACKWARD

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
PROGRAM = _BACKWARD["TOKENS"]
NAMES = ["q", "k", "v", "rest", "tail", "of projected", "of weight", "of tail"]


def run(projected, weight, tail, offsets, backend):
    """Everything that is computed, gradients of a loss that looks at all of it included."""
    sources = [x.detach().requires_grad_() for x in (projected, weight, tail)]
    outputs = queries_keys_values(*sources, HEADS, offsets, backend)
    loss = sum(
        (x.double() * torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device)).view_as(x)).sum()
        for x in outputs
    )
    return [*outputs, *torch.autograd.grad(loss, sources)]


def check(given, offsets, device, dtype, tolerance):
    expected = run(*given, offsets, "torch")
    projected, weight, tail = (x.to(device) for x in given)
    found = run(projected.to(dtype), weight.float(), tail.float(), offsets, "triton")
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert a.shape == b.shape and (a.cpu().double() - b).norm() <= tolerance * b.norm(), name
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 63, PROGRAM + 1])
def test_kernels_are_the_reference_gradients_included(device, length):
    check(inputs(length, batch=2 if length < PROGRAM else 1), None, device, torch.float32, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "head_dim"), [(1, 5), (2, 5), (3, 16), (4, 64), (5, 8), (3, 160)])
def test_any_width(device, width, head_dim):
    check(inputs(40, width=width, head_dim=head_dim), None, device, torch.float32, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "lengths", [[3, 0, 1, 40, 2, 0], [0, 70], [1, 1, 1, 1], [PROGRAM - 1, 2, 1], [PROGRAM + 1, 1, 9]]
)
def test_packed(device, lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    check(inputs(sum(lengths), 1, sequences=len(lengths)), offsets, device, torch.float32, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [None, [3, 0, 36, 1]])
def test_further_columns(device, lengths):
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    given = inputs(40, 1, sequences=None if lengths is None else len(lengths), rest=7)
    check(given, offsets, device, torch.float32, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_have_gaps(device):
    projected, weight, tail = (x.to(device, torch.float32) for x in inputs(40))
    wide = torch.cat([projected, projected], dim=-1)[..., : projected.shape[-1]]
    for a, b in zip(*(run(x, weight, tail, None, "triton") for x in (wide, projected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_keep_the_rules_of_torch_library(device):
    projected, weight, tail = (x.to(device, torch.float32).requires_grad_() for x in inputs(5, rest=3))
    torch.library.opcheck(torch.ops.resolvent.queries_keys_values.default, (projected, weight, tail, None, HEADS))
    grads, of_rest = torch.randn(3, 2, 5, 5 * HEADS, device=device), torch.randn(2, 5, 3, device=device)
    operands = (*grads, of_rest, projected.detach(), weight.detach(), tail.detach(), None, HEADS)
    torch.library.opcheck(torch.ops.resolvent.queries_keys_values_backward.default, operands)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 64, 1000])
def test_bfloat16_on_the_gpu(length):
    given = inputs(length, head_dim=64, rest=80)
    narrow = [given[0].bfloat16().double(), *given[1:]]
    one, two = (check(narrow, None, "cuda", torch.bfloat16, 5e-3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.gpu
def test_offsets_of_64_bits():
    projected, weight, tail = inputs(1, head_dim=64, batch=1)
    projected = projected.expand(-1, 6_000_000, -1).to("cuda", torch.bfloat16)  # 2.3e9 values
    weight, tail = weight.float().cuda(), projected[:, :3].float()
    q, _, v, *_ = queries_keys_values(projected, weight, tail, HEADS, backend="triton")
    assert torch.equal(v[0, -1], v[0, 3])
    assert torch.equal(q[0, -1], q[0, 3])
