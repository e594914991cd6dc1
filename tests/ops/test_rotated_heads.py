"""Heads cut from projections, with queries and keys rotated: torch code and kernel against the definition."""

import pytest
import torch

from resolvent.ops import dispatch
from resolvent.ops.memory_rotation import Rotation, rotate
from resolvent.ops.rotated_heads import rotated_heads

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not dispatch.interpreting(), reason="CUDA"))]


def definition(projected, rotation, heads, groups):
    """Cut first, rotate q and k one by one."""
    q, k, v = projected.unflatten(-1, (heads + 2 * groups, -1)).split((heads, groups, groups), -2)
    return rotate(q, rotation), rotate(k, rotation), v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "groups", "width"), [(2, 2, 16), (9, 3, 12), (3, 1, 2)])
@pytest.mark.parametrize("rows", [1, 2])
def test_equals_the_definition_with_gradients(backend, heads, groups, width, rows):
    wide = torch.randn(2, 7, (heads + 2 * groups) * width + 5)
    projected = wide[..., : (heads + 2 * groups) * width].requires_grad_()  # part of a joined product
    rotation = Rotation.by(torch.rand(rows, 7, width // 2, dtype=torch.float64), torch.float32)
    before = dispatch.calls["rotated_heads", "triton"]
    found = rotated_heads(projected, rotation, heads, groups, backend)
    assert dispatch.calls["rotated_heads", "triton"] - before == (backend == "triton")
    expected = definition(projected, rotation, heads, groups)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    weights = [torch.randn_like(x) for x in found]
    losses = [sum((x * w).sum() for x, w in zip(own, weights, strict=True)) for own in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, projected)[0] for loss in losses))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_rounded_once(backend):
    projected = torch.randn(1, 5, 4 * 8)
    rotation = Rotation.by(torch.rand(1, 5, 4, dtype=torch.float64), torch.float32)
    found = rotated_heads(projected.bfloat16(), rotation, 2, 1, backend)
    expected = definition(projected.bfloat16().float(), rotation, 2, 1)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_need_no_loss(backend):
    """A read-out that uses queries alone has gradients, zero for keys and values."""
    projected = torch.randn(1, 5, 4 * 8, requires_grad=True)
    rotation = Rotation.by(torch.rand(1, 5, 4, dtype=torch.float64), torch.float32)
    q, _, _ = rotated_heads(projected, rotation, 2, 1, backend)
    (grad,) = torch.autograd.grad(q.sin().sum(), projected)
    assert grad[..., :16].abs().min() > 0
    assert not grad[..., 16:].any()
