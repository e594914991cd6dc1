import pytest
import torch
from torch.nn import functional as F

from resolvent.ops.queries_keys_values import queries_keys_values
from resolvent.ops.short_conv import causal_conv, next_tail

HEADS = 2


def inputs(length, batch=2, width=4, head_dim=5, sequences=None, rest=0):
    """Projections with ``rest`` further columns, taps and tail."""
    channels = 3 * HEADS * head_dim
    draw = {"dtype": torch.float64}
    tail = torch.randn(sequences or batch, width - 1, channels, **draw)
    return torch.randn(batch, length, channels + rest, **draw), torch.randn(width, channels, **draw), tail


def test_are_the_convolved_projections_of_each_head():
    projected, weight, tail = inputs(9)
    q, k, v, rest, new_tail = queries_keys_values(projected, weight, tail, HEADS)
    assert rest.shape == (2, 9, 0)
    assert q.shape == k.shape == v.shape == (2, 9, HEADS, 5)
    expected = F.silu(causal_conv(projected, weight, tail)).view(2, 9, 3, HEADS, 5).unbind(2)
    for found, raw in zip((q, k), expected, strict=False):
        torch.testing.assert_close(found, F.normalize(raw, dim=-1), rtol=1e-9, atol=1e-9)
    assert torch.equal(v, expected[2])
    assert torch.equal(new_tail, next_tail(projected, tail))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_pieces_are_the_whole(cut):
    projected, weight, tail = inputs(9)
    whole = queries_keys_values(projected, weight, tail, HEADS)
    *first, middle = queries_keys_values(projected[:, :cut], weight, tail, HEADS)
    *second, end = queries_keys_values(projected[:, cut:], weight, middle, HEADS)
    for a, b, c in zip(first, second, whole, strict=False):
        torch.testing.assert_close(torch.cat([a, b], 1), c, rtol=1e-10, atol=1e-10)
    assert torch.equal(end, whole[-1])


def test_further_columns_are_handed_out():
    projected, weight, tail = inputs(9, rest=4)
    *found, rest, new_tail = queries_keys_values(projected, weight, tail, HEADS)
    *expected, _, expected_tail = queries_keys_values(projected[..., :-4], weight, tail, HEADS)
    assert torch.equal(rest, projected[..., -4:]) and torch.equal(new_tail, expected_tail)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_token_sees_a_later_one():
    projected, weight, tail = inputs(9)
    changed = projected.clone()
    changed[:, 4] += 1
    for a, b in zip(*(queries_keys_values(x, weight, tail, HEADS)[:3] for x in (projected, changed)), strict=True):
        assert torch.equal(a[:, :4], b[:, :4])
        assert not torch.equal(a[:, 4:], b[:, 4:])
