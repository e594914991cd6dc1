import dataclasses
import math
from collections import Counter
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from resolvent.data import TokenStream, build_tokenizer, encode_documents
from resolvent.errors import DataError, ResolventError
from resolvent.evaluation import LanguageScore, evaluate_documents
from resolvent.evaluation.language import document_tokens, sample_stretches, sum_of_nats
from resolvent.models.phase2 import Phase2IntegratedModel, create_phase2_model

# Lengths on both sides of every piece and batch size below, many short, one long, one empty, not sorted.
DOCUMENTS = ["naïve " * 7, "x", "the long one " * 40, "", "ab" * 31 + "c", "ab" * 32, "日本語" * 5, "short", "z" * 65]


def small_model(vocab_size: int = 257) -> Phase2IntegratedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, d_model=32, n_layers=2, n_seq=64, num_heads=2, head_dim=16)
    model = create_phase2_model(**sizes, dropout=0.5, device=torch.device("cpu"))
    with torch.no_grad():  # large weights, so that what a model has read before matters
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def model() -> Phase2IntegratedModel:
    return small_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("bytes", [])


def nats_one_by_one(model: Phase2IntegratedModel, tokenizer: Tokenizer, documents: list[str]) -> float:
    """Each document alone, in one forward pass."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([[256, *tokenizer.encode(document).ids, 256]])
            total += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
    return total


@pytest.mark.parametrize(
    ("batch_tokens", "piece_tokens"),
    [(64, 7), (100, 64), (100, 10_000), (8192, 7), (8192, 64), (8192, 512), (8192, 10_000)],
)
def test_score_does_not_depend_on_pieces_and_batches(
    model: Phase2IntegratedModel, tokenizer: Tokenizer, batch_tokens: int, piece_tokens: int
):
    score = evaluate_documents(model, DOCUMENTS, tokenizer, batch_tokens=batch_tokens, piece_tokens=piece_tokens)
    nats = nats_one_by_one(model, tokenizer, DOCUMENTS)
    num_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    tokens = num_bytes + len(DOCUMENTS)
    assert score.tokens == tokens
    assert score.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_documents_are_scored_separately(model: Phase2IntegratedModel, tokenizer: Tokenizer):
    together = evaluate_documents(model, DOCUMENTS, tokenizer)
    reversed_order = evaluate_documents(model, DOCUMENTS[::-1], tokenizer)
    assert together.loss == pytest.approx(reversed_order.loss, rel=1e-6)


def test_long_document_is_scored_with_its_whole_context(model: Phase2IntegratedModel, tokenizer: Tokenizer):
    """The same text cut into documents of its own scores otherwise."""
    text = "the long one " * 40
    whole = evaluate_documents(model, [text], tokenizer, piece_tokens=64)
    cut = evaluate_documents(model, [text[i : i + 64] for i in range(0, len(text), 64)], tokenizer)
    assert abs(whole.bits_per_byte - cut.bits_per_byte) > 1e-3


def test_uniform_model_has_the_loss_log_vocabulary(tokenizer: Tokenizer):
    model = small_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = evaluate_documents(model, ["abcd"], tokenizer)
    assert score == LanguageScore(
        loss=pytest.approx(math.log(257)),
        perplexity=pytest.approx(257, rel=1e-5),
        bits_per_byte=pytest.approx(5 / 4 * math.log2(257)),
        tokens=5,
    )


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    text = ["größer und größer " * 9]
    tokenizer = build_tokenizer("bpe", text, vocab_size=260)
    score = evaluate_documents(small_model(vocab_size=260), text, tokenizer)
    assert score.tokens < len(text[0].encode())
    bits = score.loss * score.tokens / math.log(2)
    assert score.bits_per_byte == pytest.approx(bits / len(text[0].encode()))


def test_a_stream_needs_no_tokenizer(model: Phase2IntegratedModel, tokenizer: Tokenizer):
    stream = encode_documents(DOCUMENTS, tokenizer)
    assert evaluate_documents(model, stream) == evaluate_documents(model, DOCUMENTS, tokenizer)
    with pytest.raises(TypeError, match="needs a tokenizer"):
        evaluate_documents(model, DOCUMENTS)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_not_changed(model: Phase2IntegratedModel, tokenizer: Tokenizer, training: bool):
    model.train(training)
    first, second = (evaluate_documents(model, DOCUMENTS, tokenizer) for _ in range(2))
    assert first == second  # no dropout
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_text_is_an_error(model: Phase2IntegratedModel, tokenizer: Tokenizer):
    for documents in ([], ["", ""]):
        with pytest.raises(DataError, match="no"):
            evaluate_documents(model, documents, tokenizer)


def test_a_broken_model_is_an_error(tokenizer: Tokenizer):
    model = small_model()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ResolventError, match="not finite"):
        evaluate_documents(model, ["text"], tokenizer)


def stream_of(*lengths: int) -> TokenStream:
    """Documents of random bytes, so that tokens are bytes."""
    random = Random(0)
    texts = ["".join(random.choices("abcdefgh", k=length)) for length in lengths]
    return encode_documents(texts, build_tokenizer("bytes", []))


@pytest.mark.parametrize("lengths", [(300_000, 50), (50,) * 2000, (1, 9_000, 3, 70_000, 200, 20_000), (99_999,)])
@pytest.mark.parametrize("budget", [1, 2, 700, 20_000, 65_536])
def test_sample_has_exactly_the_requested_tokens(lengths: tuple[int, ...], budget: int):
    stream = stream_of(*lengths)
    sample = sample_stretches(stream, budget)
    assert sample.num_predictions == budget
    assert max(map(len, sample.sequences)) <= 2049
    # A byte per token, but for the tokens that end documents.
    assert sample.num_bytes == pytest.approx(budget * stream.num_bytes / stream.num_predictions, rel=0.05, abs=2)


@pytest.mark.parametrize("budget", [0, 10_004, 10**9])
def test_a_budget_beyond_the_text_takes_whole_documents(budget: int):
    stream = stream_of(4000, 6000, 1)
    sample = sample_stretches(stream, budget)
    assert [len(sequence) - 1 for sequence in sample.sequences] == [4001, 6001, 2]
    assert (sample.num_predictions, sample.num_bytes) == (10_004, 10_001)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_every_token_is_sampled_with_equal_probability(lengths: list[int], data: st.DataObject):
    """Over all positions at which a sample may begin, each prediction is made equally often, in its own document."""
    stream = stream_of(*lengths)
    numbered = dataclasses.replace(stream, tokens=np.arange(len(stream.tokens)))
    total = stream.num_predictions
    budget = data.draw(st.integers(1, total))
    counts = np.zeros(total + 1, int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resolvent.evaluation.language._STRETCH_TOKENS", data.draw(st.integers(4, 40)))
        for first in range(total):
            patch.setattr(np.random, "default_rng", lambda _, first=first: SimpleNamespace(integers=lambda _: first))
            for sequence in sample_stretches(numbered, budget).sequences:
                assert np.array_equal(sequence, np.arange(sequence[0], sequence[-1] + 1))
                assert not set(sequence[1:-1]) & set(stream.starts), "read on over the end of a document"
                counts[sequence[1:]] += 1
    assert np.unique(counts[1:]).tolist() == [budget]


def test_sample_covers_the_whole_text():
    numbered = dataclasses.replace(stream_of(100_000), tokens=np.arange(100_002))
    tenths = Counter(int(token) // 10_000 for part in sample_stretches(numbered, 20_480).sequences for token in part)
    assert min(tenths[number] for number in range(10)) > 1500


def test_the_score_of_a_sample_is_near_that_of_the_text(tokenizer: Tokenizer):
    text = DOCUMENTS[0] * 40
    model = small_model(vocab_size=tokenizer.get_vocab_size())
    whole = evaluate_documents(model, [text], tokenizer)
    sample = evaluate_documents(model, [text], tokenizer, max_tokens=whole.tokens // 3)
    assert sample.tokens == whole.tokens // 3
    assert sample.loss == pytest.approx(whole.loss, rel=0.05)
    assert sample.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.05)


def test_progress_is_shown_on_stderr_if_requested(tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]):
    model = small_model(vocab_size=tokenizer.get_vocab_size())
    seen: list[int] = []
    sequences = document_tokens(encode_documents(DOCUMENTS, tokenizer))
    sum_of_nats(model, sequences, batch_tokens=64, piece_tokens=16, advance=seen.append)
    assert len(seen) > 3
    assert sum(seen) == sum(map(len, sequences)) - len(sequences)
    evaluate_documents(model, DOCUMENTS, tokenizer)
    assert capfd.readouterr() == ("", "")
