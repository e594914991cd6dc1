import math

import pytest
import torch
import torch.nn.functional as F

from resolvent import get_phase2_preset
from resolvent.benchmark.peers import GPT, rotate, rotations


@pytest.fixture
def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(vocab_size=50, d_model=32, n_layers=3, num_heads=4).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            # Larger than at the start of training, so that attention is far from uniform.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 12], [1, 19], [13, 7]])
def test_reading_with_the_cache_equals_one_forward(gpt: GPT, pieces: list[int]):
    ids = torch.randint(50, (2, 20))
    cache = gpt.new_cache(batch_size=2, capacity=23)
    logits = torch.cat([gpt(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(logits, gpt(ids), rtol=1e-10, atol=1e-10)


def test_ring_equals_the_cache_until_it_is_full(gpt: GPT):
    ids = torch.randint(50, (2, 20))
    cache = gpt.new_cache(batch_size=2, capacity=20)
    gpt(ids[:, :19], cache=cache)
    ring = gpt.new_ring(cache)
    torch.testing.assert_close(gpt(ids[:, 19:], cache=ring), gpt(ids)[:, 19:], rtol=1e-10, atol=1e-10)
    assert ring.length == 20


def test_full_ring_drops_its_oldest_token(gpt: GPT):
    """A single layer gives the same result with the window alone, since it sees only the window."""
    gpt.blocks = gpt.blocks[:1]
    ids = torch.randint(50, (1, 27))
    cache = gpt.new_cache(batch_size=1, capacity=20)
    gpt(ids[:, :19], cache=cache)
    ring = gpt.new_ring(cache)
    logits = torch.cat([gpt(token, cache=ring) for token in ids[:, 19:].split(1, dim=1)], dim=1)
    for i in range(8):  # positions are relative: the window may as well start at zero
        torch.testing.assert_close(logits[:, i : i + 1], gpt(ids[:, i : i + 20])[:, -1:], rtol=1e-5, atol=1e-5)


def test_lower_length_drops_later_tokens(gpt: GPT):
    prefix, first, second = torch.randint(50, (3, 1, 6))
    cache = gpt.new_cache(batch_size=1, capacity=12)
    gpt(prefix, cache=cache)
    gpt(first, cache=cache)
    cache.length = 6
    expected = gpt(torch.cat([prefix, second], dim=1))[:, 6:]
    torch.testing.assert_close(gpt(second, cache=cache), expected, rtol=1e-10, atol=1e-10)


def test_a_full_cache_is_an_error(gpt: GPT):
    cache = gpt.new_cache(batch_size=1, capacity=4)
    with pytest.raises(ValueError, match="the cache holds 4 tokens, but 5 were given"):
        gpt(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


def test_attention_is_causal_and_uses_everything_before(gpt: GPT):
    ids = torch.randint(50, (1, 12))
    logits = gpt(ids)
    for position in range(12):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 50
        differs = (gpt(changed) - logits).abs().amax(-1)[0] > 1e-9
        assert differs.tolist() == [False] * position + [True] * (12 - position)


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            rotate(x[None], rotations(position, 1, 16, x.device))
            for x, position in [(q, query_position), (k, key_position)]
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-5)
    assert (score(7, 3) - score(8, 3)).abs() > 1e-3
    torch.testing.assert_close(score(5, 5), q @ k)


def test_labels_give_the_cross_entropy_of_the_logits(gpt: GPT):
    ids, labels = torch.randint(50, (2, 3, 20))
    expected = F.cross_entropy(gpt(ids).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(gpt(ids, labels=labels), expected, rtol=1e-10, atol=0)


def test_starts_at_chance_and_learns():
    torch.manual_seed(0)
    gpt = GPT(vocab_size=50, d_model=32, n_layers=2, num_heads=4)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    ids = torch.randint(50, (4, 17))
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(50), abs=0.1)
    assert losses[-1] < 1


@pytest.mark.parametrize(("preset", "millions"), [("small", 29.05), ("base", 70.95), ("large", 256.33)])
def test_has_the_size_of_the_preset(preset: str, millions: float):
    with torch.device("meta"):
        gpt = GPT.like(get_phase2_preset(preset))
    assert gpt.num_parameters() == pytest.approx(millions * 1e6, rel=0.02)
    assert (gpt.num_heads, gpt.head_dim) == (get_phase2_preset(preset).num_heads, 64)


def test_unfit_heads_are_an_error():
    with pytest.raises(ValueError, match="d_model must be a multiple of 2 \\* num_heads = 10, got 32"):
        GPT(vocab_size=50, d_model=32, n_layers=1, num_heads=5)
