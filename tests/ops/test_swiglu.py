import pytest
import torch
from torch.nn import functional as F

from resolvent.ops import dispatch
from resolvent.ops.swiglu import swiglu, swiglu_product


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


def test_product_and_its_gradients_are_those_of_autograd():
    x, weight = torch.randn(3, 50, 64).bfloat16().requires_grad_(), torch.randn(16, 32).bfloat16().requires_grad_()
    grad, found, expected = torch.randn(3, 50, 16).bfloat16(), swiglu_product(x, weight), F.linear(plain(x), weight)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_the_product():
    draw = {"dtype": torch.float64, "requires_grad": True}
    assert torch.autograd.gradcheck(swiglu_product, (torch.randn(3, 5, 16, **draw), torch.randn(4, 8, **draw)))


def test_the_product_keeps_its_inputs_alone():
    x, weight, kept = torch.randn(100, 64, requires_grad=True), torch.randn(16, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu_product(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]


def test_a_frozen_weight_has_no_gradient():
    x, weight = torch.randn(10, 64, requires_grad=True), torch.randn(16, 32)
    (grad,) = torch.autograd.grad(swiglu_product(x, weight).sum(), x)
    (expected,) = torch.autograd.grad((swiglu(x) @ weight.mT).sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.skipif(not dispatch.interpreting(), reason="Triton compiles for the GPU here")
@pytest.mark.parametrize("hidden", [32, 1100])
def test_the_kernel_equals_torch_code_where_no_gradient_is_needed(hidden):
    x = torch.randn(2, 5, 2 * hidden + 3)[..., : 2 * hidden]  # part of a joined product
    weight = torch.randn(4, hidden) * hidden**-0.5
    for function, inputs in ((swiglu, (x,)), (swiglu_product, (x, weight))):
        before = dispatch.calls["swiglu", "triton"]
        found, expected = function(*inputs, backend="triton"), function(*inputs, backend="torch")
        assert dispatch.calls["swiglu", "triton"] == before + 1
        torch.testing.assert_close(found, expected)
        function(*(y.clone().requires_grad_() for y in inputs), backend="triton").sum().backward()
        assert dispatch.calls["swiglu", "triton"] == before + 1
