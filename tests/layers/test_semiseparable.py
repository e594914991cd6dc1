import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resolvent.layers import AdaptiveRankSemiseparableLayer


def trained(rank=8, **options):
    layer = AdaptiveRankSemiseparableLayer(24, rank, 12, **options)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4)
    return layer


@pytest.mark.parametrize("bounded", [True, False])
def test_is_the_formula(bounded):
    layer, x = trained(bounded=bounded).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    output, gates, _ = layer(x)
    g = torch.sigmoid(layer.gate_proj(torch.relu(layer.gate_hidden(x))))
    assert torch.equal(g, gates)
    for t in range(9):
        c = (g[:, : t + 1] * layer.u_proj(x[:, : t + 1])).sum(1)
        c = c / (1 + c**2).sqrt() if bounded else c
        near = sum(layer.conv_weight[j] * x[:, t - j] for j in range(3) if t >= j)
        expected = layer.out_proj(c * g[:, t] * layer.v_proj(x[:, t])) + near
        torch.testing.assert_close(output[:, t], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("rank", [8, 3])
def test_split_packed_and_stepwise_are_the_whole(rank):
    layer, x = trained(), torch.randn(1, 40, 24)
    layer.set_rank(rank)
    whole, _, last = layer(x)
    for splits in ([1] * 40, [13, 27]):
        pieces, state = [], None
        for piece in x.split(splits, dim=1):
            output, _, state = layer(piece, state)
            pieces.append(output)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.total, last.total, rtol=1e-5, atol=1e-5)
    packed, _, states = layer(x, cu_seqlens=torch.tensor([0, 13, 13, 40]))
    torch.testing.assert_close(packed[:, :13], layer(x[:, :13])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 13:], layer(x[:, 13:])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(states.total[1], torch.zeros(8).double())


def test_the_sum_that_the_layer_reads_is_bounded():
    """The same last tokens behind a past of the same tokens that is a hundred times as long."""
    piece, last = torch.randn(1, 50, 24), torch.randn(1, 3, 24)

    def answer(layer, times):
        return layer(torch.cat([piece] * times + [last], dim=1))[0][:, -1].norm()

    layer, free = trained(), trained(bounded=False)
    assert answer(layer, 100) < 2 * answer(layer, 1)
    assert answer(free, 100) > 20 * answer(free, 1)


def test_the_output_starts_at_zero_and_every_weight_learns():
    layer, x = AdaptiveRankSemiseparableLayer(24, 8, 12), torch.randn(2, 9, 24)
    assert not layer(x)[0].any()
    for _ in range(2):
        layer.zero_grad()
        (layer(x)[0] - torch.randn(2, 9, 24)).square().sum().backward()
        for parameter in (layer.out_proj.weight, layer.conv_weight):
            parameter.data -= 1e-2 * parameter.grad
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any(), name


def test_a_lower_rank_does_less_work():
    layer, x = trained(rank=64), torch.randn(1, 32, 24)

    def flops(rank):
        layer.set_rank(rank)
        with FlopCounterMode(display=False) as counter:
            layer(x)[0].sum().backward()
        return counter.get_total_flops()

    fixed = 3 * 2 * 32 * 24 * 12 - 2 * 32 * 24 * 12  # the gate's hidden layer: forward and its weight's gradient
    assert (flops(16) - fixed) / (flops(64) - fixed) == pytest.approx(0.25, abs=0.02)


def test_a_higher_rank_changes_no_output_at_first():
    """Channels that were never in use add nothing, whatever their other weights."""
    layer, x = AdaptiveRankSemiseparableLayer(24, 8, 12), torch.randn(2, 9, 24)
    layer.set_rank(3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x)[0] - torch.randn(2, 9, 24)).square().sum().backward()
        optimizer.step()
    assert layer.out_proj.weight[:, :3].all()
    low = layer(x)[0]
    layer.set_rank(8)
    torch.testing.assert_close(layer(x)[0], low, rtol=1e-5, atol=1e-6)
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"between 1 and the layer's 8, got {wrong}"):
            layer.set_rank(wrong)
