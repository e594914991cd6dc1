import math

import pytest
import torch

from resolvent.ops.memory_rotation import rotate_queries_keys
from resolvent.ops.rotary import Scaling, rotary_turns


def rotate(x, turns):
    """Rotate queries (B, N, H, K) by turns (B, N, K / 2)."""
    return rotate_queries_keys(x, x, turns)[0]


def exact(x, position, base=10_000.0):
    """Rotate with complex numbers in float64."""
    half = x.shape[-1] // 2
    angle = position.double()[..., None, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("base", [100.0, 10_000.0])
def test_pairs_turn_with_the_position(base):
    x, position = torch.randn(2, 30, 3, 8, dtype=torch.float64), torch.arange(60).view(2, 30)
    torch.testing.assert_close(rotate(x, rotary_turns(position, 8, base)), exact(x, position, base))


def test_scores_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 40, 2, 16, dtype=torch.float64)

    def scores(first):
        turns = rotary_turns(torch.arange(first, first + 40).unsqueeze(0), 16)
        return torch.einsum("bqhk,bshk->bhqs", rotate(q, turns), rotate(k, turns))

    torch.testing.assert_close(scores(5_000_000), scores(0), rtol=0, atol=1e-7)


def test_single_precision_is_exact_at_ten_million():
    x, position = torch.randn(1, 5, 2, 64), torch.arange(10_000_000, 10_000_005).unsqueeze(0)
    found = rotate(x, rotary_turns(position, 64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(x, position), rtol=0, atol=2e-6)
    half = rotate(x.bfloat16(), rotary_turns(position, 64))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact(x.bfloat16(), position), rtol=2**-8, atol=2**-8)


def test_the_fastest_pair_turns_by_one_radian_per_token_and_odd_widths_are_refused():
    assert rotary_turns(torch.tensor([1]), 8)[0, 0].item() == pytest.approx(1 / (2 * math.pi), rel=1e-15)
    with pytest.raises(ValueError, match="need an even head width, got 7"):
        rotary_turns(torch.arange(3), 7)


def test_linear_scaling_divides_the_positions():
    position = torch.arange(50)
    torch.testing.assert_close(
        rotary_turns(position, 16, scaling=Scaling("linear", 4.0)), rotary_turns(position, 16) / 4.0
    )


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones():
    plain, scaled = (
        rotary_turns(torch.tensor([1]), 64, scaling=scaling)[0] for scaling in (None, Scaling("llama3", 8.0, 128))
    )
    per_window = plain * 128
    torch.testing.assert_close(scaled[per_window > 4], plain[per_window > 4])
    torch.testing.assert_close(scaled[per_window < 1], plain[per_window < 1] / 8)
    between = (per_window > 1) & (per_window < 4)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_dynamic_scaling_begins_beyond_the_original_length():
    scaling = Scaling("dynamic", 2.0, 32)
    plain, scaled = rotary_turns(torch.arange(100), 16), rotary_turns(torch.arange(100), 16, scaling=scaling)
    torch.testing.assert_close(scaled[:32], plain[:32])
    assert (scaled[32:, 1:] < plain[32:, 1:]).all()
    base = 10_000.0 * (2.0 * 100 / 32 - 1) ** (16 / 14)  # after 100 tokens
    torch.testing.assert_close(scaled[99], rotary_turns(torch.tensor(99), 16, base))
