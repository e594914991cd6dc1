"""The gated feed-forward network."""

import pytest
import torch

from resolvent.layers import GatedFeedForward, gated_width


def test_it_is_the_formula():
    layer, x = GatedFeedForward(6, 32).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    gate, value = (x @ layer.in_proj.weight[rows].T for rows in (slice(32), slice(32, 64)))
    expected = (gate / (1 + torch.exp(-gate)) * value) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for tokens, result in ((x, expected), (x[0, 0], expected[0, 0])):
            torch.testing.assert_close(layer(tokens), result, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("plain", "gated"), [(1, 32), (512, 352), (1024, 672), (2048, 1376), (4096, 2720)])
def test_it_has_about_as_many_parameters_as_a_plain_one(plain: int, gated: int):
    assert gated_width(plain) == gated
    if plain > 1:
        assert 3 * gated == pytest.approx(2 * plain, rel=0.035)
