import pytest
import torch

from resolvent.layers import DissipativeHebbianLayer, LocalAttentionLayer
from resolvent.ops import local_attention_reference
from resolvent.ops.memory_rotation import rotate_queries_keys
from resolvent.ops.rotary import rotary_turns


def layer_of(window=16, **options):
    return LocalAttentionLayer(32, 2, 8, window, **options)


@pytest.mark.parametrize("options", [{}, {"conv_size": 1}, {"output_gate": False}, {"output_norm": False}])
def test_shapes_with_and_without_options(options):
    layer = layer_of(**options)
    out = layer(torch.randn(3, 70, 32))
    assert out.gated.shape == (3, 70, 16)
    assert out.readout.shape == (3, 70, 16)
    assert out.values.shape == (3, 70, 2, 8)
    assert out.state.keys.shape[1:] == out.state.values.shape[1:] == layer.state_shape[0]
    assert out.conv_tail.shape[1:] == layer.state_shape[1]


def test_parameters_are_those_of_the_memory_but_eta():
    def shapes(layer):
        return {name: tuple(p.shape) for name, p in layer.named_parameters()}

    memory, attention = shapes(DissipativeHebbianLayer(32, 2, 8)), shapes(layer_of())
    assert attention.pop("log_temperature") == memory.pop("log_eta")
    assert attention == memory


def test_it_is_attention_over_rotated_queries_and_keys():
    layer, x = layer_of(output_norm=False, output_gate=False), torch.randn(2, 50, 32)
    assert layer.temperature.tolist() == pytest.approx([10, 10])
    layer.log_temperature.data += torch.randn(2)
    heads = layer.heads(layer.qkv_proj(x), None, None)
    torch.testing.assert_close(heads.q.norm(dim=-1), torch.ones(2, 50, 2))
    q, k = rotate_queries_keys(heads.q, heads.k, rotary_turns(torch.arange(50).unsqueeze(0), 8))
    exact, _ = local_attention_reference(q, k, heads.v, layer.temperature, layer.window)
    out = layer(x)
    torch.testing.assert_close(out.readout.double(), exact.flatten(-2), rtol=0, atol=1e-6)
    assert torch.equal(out.gated, out.readout)


@pytest.mark.parametrize("window", [16, None])
def test_any_split_equals_one_call_far_from_the_start(window):
    layer, x = layer_of(window), torch.randn(2, 60, 32)
    start = torch.full((2,), 300 if window is None else 3_000_000)
    _, _, _, state, tail = layer(torch.randn(2, 300, 32))
    whole = layer(x, state, tail, start)
    pieces, position = [], start
    for piece in x.split([1, 30, 1, 28], 1):
        out = layer(piece, state, tail, position)
        state, tail, position = out.state, out.conv_tail, position + piece.shape[1]
        pieces.append(out.gated)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.gated, rtol=1e-5, atol=1e-6)


def test_all_parameters_have_gradients():
    layer = layer_of()
    layer.out_proj(layer(torch.randn(2, 50, 32)).gated).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
