import pytest
import torch
from torch import nn

from resolvent.layers import linear
from resolvent.layers.linear import LowRankLinear, is_plain, product_of_parts, products


class Wrapped(nn.Linear):
    pass


@pytest.fixture(params=[True, False], ids=["joined", "apart"], autouse=True)
def joined(request, monkeypatch):
    """Products as on CUDA, joined, and as on a CPU."""
    monkeypatch.setattr(linear, "_launches_cost", lambda device: request.param)
    return request.param


def test_a_linear_map_is_plain_until_something_acts_on_its_calls():
    plain, pre, post, backward, replaced = (nn.Linear(3, 2) for _ in range(5))
    backward.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    pre.register_forward_pre_hook(lambda module, args: None)
    handle = post.register_forward_hook(lambda module, args, output: None)
    replaced.forward = lambda x: x  # as Accelerate hooks into a module
    assert is_plain(plain)
    assert not any(map(is_plain, (pre, post, backward, replaced, Wrapped(3, 2), nn.Identity())))
    handle.remove()
    assert is_plain(post)


def test_products_of_several_layers_are_those_of_each(joined):
    layers, x = [nn.Linear(8, 5, bias=False), None, nn.Linear(8, 3, bias=False)], torch.randn(2, 7, 8)
    found = products(x, layers)
    assert (found[0]._base is found[2]._base is not None) == joined  # views of one product
    assert found[1] is None
    for layer, out in zip(layers, found, strict=True):
        assert layer is None or torch.allclose(out, layer(x), atol=1e-6)


def test_product_of_parts_is_the_sum_of_each():
    layers = [nn.Linear(8, 5, bias=False), nn.Linear(3, 5, bias=False)]
    inputs = [torch.randn(2, 7, 8), torch.randn(2, 7, 3)]
    expected = layers[0](inputs[0]) + layers[1](inputs[1])
    torch.testing.assert_close(product_of_parts(torch.cat(inputs, dim=-1), [8, 3], layers), expected)


@pytest.mark.parametrize("wrapped", [LowRankLinear(8, 3, 2), nn.Linear(8, 3)])
def test_layers_that_are_not_plain_are_called(wrapped):
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    plain, x = nn.Linear(8, 3, bias=False), torch.randn(2, 7, 8)
    assert torch.equal(products(x, [plain, wrapped])[1], wrapped(x))
    assert torch.equal(product_of_parts(torch.cat([x, x], dim=-1), [8, 8], [plain, wrapped]), plain(x) + wrapped(x))
    assert len(calls) == 4


def test_weights_of_joined_products_get_their_own_gradients():
    layers, x = [nn.Linear(8, 5, bias=False), nn.Linear(8, 3, bias=False)], torch.randn(2, 7, 8)
    (products(x, layers)[0].sum() + 2 * products(x, layers)[1].sum()).backward()
    for factor, layer in enumerate(layers, start=1):
        torch.testing.assert_close(layer.weight.grad, factor * x.sum((0, 1)).expand_as(layer.weight))
