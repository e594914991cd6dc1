import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resolvent.data import build_tokenizer, encode_documents
from resolvent.errors import ConfigError, DataError, ResolventError
from resolvent.evaluation import measure_influence
from resolvent.evaluation.influence import input_gradients, replacement_divergences
from resolvent.models import IntegratedModel
from tests.models.small import PHASE1, PHASE2, tokens

BYTES = build_tokenizer("bytes", [])

MODELS = {
    "phase 2": lambda: PHASE2.model(),
    "phase 2, no consolidation": lambda: PHASE2.model(snr_enabled=False, resonance_enabled=False),
    "phase 2, everything converted": lambda: PHASE2.model(ar_ssm_rank=4, htt_rank=4),
    "phase 1": lambda: PHASE1.model(),
    "phase 1, checkpointed": lambda: PHASE1.model(use_gradient_checkpointing=True, checkpoint_htt=True),
    "phase 1, resolvent alone": lambda: PHASE1.model(ar_ssm_enabled=False, htt_enabled=False),
}
# The short convolution's tail is float32 in a state, whatever the model: float64 goes without it.
WIDE_MODELS = {
    "phase 2": lambda: PHASE2.model(conv_size=1),
    "phase 2, everything converted": lambda: PHASE2.model(conv_size=1, ar_ssm_rank=4, htt_rank=4),
    "phase 1": lambda: PHASE1.model(),
}


def plain_gradients(model: IntegratedModel, ids: Tensor) -> Tensor:
    """Gradients (B, N, D) of the last loss in all embeddings, by autograd through the whole sequence."""
    leaves = []

    def keep(_module: object, _arguments: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    handle = model.token_embedding.register_forward_hook(keep)
    logits = model(ids[:, :-1])[:, -1]
    handle.remove()
    return torch.autograd.grad(F.cross_entropy(logits, ids[:, -1], reduction="sum"), leaves)[0]


def piecewise_gradients(model: IntegratedModel, ids: Tensor, piece: int) -> Tensor:
    pieces = list(input_gradients(model, ids, piece_tokens=len(ids) * piece))
    return torch.cat(pieces[::-1], dim=1)


def largest_difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("piece", [23, 200])
def test_gradients_are_those_of_plain_autograd(name: str, piece: int):
    model, ids = MODELS[name](), tokens(161)
    assert largest_difference(piecewise_gradients(model, ids, piece), plain_gradients(model, ids)) <= 1e-5


@pytest.mark.parametrize("name", WIDE_MODELS)
@pytest.mark.parametrize("piece", [43, 64])  # the last piece of the first is a single token
def test_gradients_are_those_of_plain_autograd_in_float64(name: str, piece: int):
    model, ids = WIDE_MODELS[name]().double(), tokens(131)
    assert largest_difference(piecewise_gradients(model, ids, piece), plain_gradients(model, ids)) <= 1e-10


def test_distant_gradients_are_as_accurate_as_near_ones():
    """Relative to themselves, not to the largest: those 140 tokens back are a thousandth of it."""
    model, ids = PHASE2.model(), tokens(150)
    narrow = piecewise_gradients(model, ids, 16).norm(dim=-1)
    exact = plain_gradients(model.double(), ids).norm(dim=-1)
    assert (exact[:, :10].max() / exact.max()) < 0.05
    assert ((narrow - exact).abs() / exact).max() < 1e-3


def test_memory_is_bounded_by_a_piece():
    model, ids = PHASE2.model(), tokens(401)  # two rows in pieces of 25, all read twice but for the last
    sizes: list[int] = []
    model.token_embedding.register_forward_hook(lambda _module, inputs, _output: sizes.append(inputs[0].numel()))
    list(input_gradients(model, ids, piece_tokens=50))
    assert max(sizes) == 50 and sum(sizes) == 2 * 800 - 50
    sizes.clear()
    replacement_divergences(model, ids[0], np.array([0, 10, 200]), np.zeros(3, int), batch_tokens=64)
    assert max(sizes) <= 64


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_divergences_equal_separate_readings(name: str, batch_tokens: int):
    model, ids = MODELS[name]().double(), tokens(150, batch=1)
    places = np.array([149, 0, 64, 63, 64, 148, 100])
    others = (ids[0, places].numpy() + np.arange(1, 8)) % 97
    got = replacement_divergences(model, ids[0], places, others, batch_tokens=batch_tokens)
    variants = ids.repeat(len(places), 1)
    variants[torch.arange(len(places)), places] = torch.from_numpy(others)
    with torch.no_grad():
        log_p, log_q = (model(x)[:, -1].log_softmax(dim=-1) for x in (ids, variants))
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-12)
    assert got[0] > 1e-3


def test_a_token_replaced_by_itself_changes_nothing():
    model, ids = PHASE2.model(), tokens(100, batch=1)[0]
    places = np.array([0, 50, 99])
    assert replacement_divergences(model, ids, places, ids[places].numpy(), batch_tokens=64).max() < 1e-10


def test_distances_count_back_from_the_predicted_token():
    """A text of two letters, as long as it must be: neither the place nor what replaces a token is left to chance."""
    text = "ab" * 20 + "b"
    model = PHASE2.model(vocab_size=257)
    result = measure_influence(model, encode_documents([text], BYTES), length=40, sequences=1, replacements=2)
    ids = torch.tensor([[256, *text.encode()]])
    norms = plain_gradients(model, ids)[0].norm(dim=-1)
    assert [row.bucket for row in result.rows] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 40)]
    for row in result.rows:
        expected = norms[41 - row.last : 42 - row.first].mean().item()
        assert row.gradient.mean == pytest.approx(expected, rel=1e-3)
        assert row.gradient.standard_error is None
    for distance, row in ((1, result.rows[0]), (2, result.rows[1])):
        place = 41 - distance
        other = np.array([ord("a") + ord("b") - int(ids[0, place])])
        expected = replacement_divergences(model, ids[0, :-1], np.array([place]), other, batch_tokens=99)
        assert row.divergence.mean == pytest.approx(expected.item(), rel=1e-4)


def test_influence_vanishes_without_memory_and_stays_without_decay():
    text = encode_documents(["the quick brown fox jumps over the lazy dog. " * 12], BYTES)
    forgetful = PHASE1.model(vocab_size=257, ar_ssm_enabled=False, htt_enabled=False)
    lasting = PHASE2.model(
        vocab_size=257, spread=0.05, base_decay=1e-6, adaptive_decay=False, snr_enabled=False, resonance_enabled=False
    )
    far = [
        measure_influence(model, text, length=256, sequences=1, replacements=2).rows[-1]
        for model in (forgetful, lasting)
    ]
    assert far[0].gradient.mean < 1e-20
    assert far[1].gradient.mean > 1e-6
    assert far[1].divergence.mean > 1e-9


def test_model_is_not_changed():
    model = PHASE2.model(vocab_size=257).train()
    model.ln_f.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    stream = encode_documents(["some text to read " * 5], BYTES)
    sizes = dict(length=40, sequences=2, replacements=2)
    first, again = (measure_influence(model, stream, **sizes) for _ in range(2))
    assert first == again
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.token_embedding._forward_hooks
    assert measure_influence(model, stream, **sizes, seed=1) != first


@pytest.mark.parametrize("option", ["length", "sequences", "replacements"])
def test_wrong_numbers_are_errors(option: str):
    with pytest.raises(ConfigError, match=f"{option} must be >= 1, got 0"):
        measure_influence(PHASE2.model(vocab_size=257), encode_documents(["text"], BYTES), **{option: 0})


def test_short_or_constant_text_is_an_error():
    model = PHASE2.model(vocab_size=257)
    with pytest.raises(DataError, match="the text has 4 tokens, a sequence needs 9"):
        measure_influence(model, encode_documents(["text"], BYTES), length=8)
    with pytest.raises(DataError, match="repeats one token, 97"):
        measure_influence(model, encode_documents(["aaaa"], BYTES), length=3)


def test_a_broken_model_is_an_error():
    model = PHASE2.model(vocab_size=257)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ResolventError, match="not finite"):
        measure_influence(model, encode_documents(["text"], BYTES), length=3)
