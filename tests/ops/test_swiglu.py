import torch
from torch.nn import functional as F

from resolvent.ops.swiglu import swiglu


def plain(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def test_gradients():
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True))


def test_values_and_gradients_are_those_of_autograd_in_half_precision():
    x, grad = torch.randn(100, 64).bfloat16().requires_grad_(), torch.randn(100, 32).bfloat16()
    found, expected = swiglu(x), plain(x)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)))


def test_only_the_input_is_kept_for_the_gradient():
    x, kept = torch.randn(100, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
