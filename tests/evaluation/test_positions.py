import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from resolvent.data import TokenStream, build_tokenizer, encode_documents
from resolvent.errors import ConfigError, DataError, ResolventError
from resolvent.evaluation import PositionScores, evaluate_documents, evaluate_positions
from resolvent.evaluation.language import document_tokens
from resolvent.evaluation.positions import token_bytes
from resolvent.models import IntegratedModel
from tests.models.small import PHASE1, PHASE2, SmallPhase

DOCUMENTS = ["one naïve rhyme " * 9, "short", "the long one, the long one " * 12, "", "ab" * 31]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("bytes", [])


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer) -> TokenStream:
    return encode_documents(DOCUMENTS, tokenizer)


def nats_in_one_go(model: IntegratedModel, sequence: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(sequence.astype(np.int64))[None]
    with torch.no_grad():
        return F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none").double().numpy()


def nats_in_a_window(model: IntegratedModel, sequence: np.ndarray, place: int, width: int) -> float:
    """Nats of the token at a place, in the window that has it in its second half, or in the first window."""
    step = max(1, width // 2)
    start = 0 if place <= width else math.ceil((place - width) / step) * step
    return nats_in_one_go(model, sequence[start : place + 1])[-1]


@pytest.mark.parametrize("phase", [PHASE1, PHASE2])
@pytest.mark.parametrize("batch_tokens", [7, 4096])
def test_buckets_equal_one_pass_over_the_texts(
    phase: SmallPhase, stream: TokenStream, tokenizer: Tokenizer, batch_tokens: int
):
    model, length = phase.model(vocab_size=257, n_seq=24), 150
    scores = evaluate_positions(model, stream, tokenizer, length=length, sequences=4, batch_tokens=batch_tokens)
    longest = sorted(document_tokens(stream), key=len, reverse=True)[:4]
    nats = [nats_in_one_go(model, document[: length + 1]) for document in longest]
    assert [row.bucket for row in scores.rows][-1] == (129, 150)
    for row in scores.rows:
        parts = [part for values in nats if len(part := values[row.first - 1 : row.last])]
        assert (row.sequences, row.tokens) == (len(parts), sum(map(len, parts)))
        assert row.loss.mean == pytest.approx(np.concatenate(parts).mean(), rel=1e-5)
        assert row.perplexity == pytest.approx(math.exp(row.loss.mean))


@pytest.mark.parametrize("width", [1, 7, 24])
def test_windows_have_between_half_and_all_of_the_training_length_as_context(
    stream: TokenStream, tokenizer: Tokenizer, width: int
):
    model, length = PHASE2.model(vocab_size=257, n_seq=width), 60
    scores = evaluate_positions(model, stream, tokenizer, length=length, sequences=2)
    assert scores.training_length == width
    longest = sorted(document_tokens(stream), key=len, reverse=True)[:2]
    for row in scores.rows:
        places = range(row.first, row.last + 1)
        expected = [nats_in_a_window(model, text, place, width) for text in longest for place in places]
        assert row.windows_loss.mean == pytest.approx(np.mean(expected), rel=1e-5)
        assert row.gain.mean == pytest.approx(row.windows_loss.mean - row.loss.mean, abs=1e-9)
        if row.last <= width:
            assert row.gain.mean == pytest.approx(0, abs=1e-5)
    assert max(abs(row.gain.mean) for row in scores.rows) > 1e-3


def totals(scores: PositionScores) -> tuple[float, float, int]:
    """Nats, bytes and tokens of all buckets."""
    nats = [row.loss.mean * row.tokens for row in scores.rows]
    sizes = [n / math.log(2) / row.bits_per_byte for n, row in zip(nats, scores.rows, strict=True) if row.bits_per_byte]
    return sum(nats), sum(sizes), sum(row.tokens for row in scores.rows)


@pytest.mark.parametrize("spec", ["bytes", "bpe"])
@pytest.mark.parametrize("joined", [False, True])
def test_buckets_sum_up_to_the_whole_text(spec: str, joined: bool):
    tokenizer = build_tokenizer(spec, DOCUMENTS, vocab_size=280)
    stream = encode_documents(DOCUMENTS, tokenizer)
    model = PHASE2.model(vocab_size=tokenizer.get_vocab_size())
    scores = evaluate_positions(model, stream, tokenizer, length=1000, joined=joined)
    nats, num_bytes, tokens = totals(scores)
    assert tokens == stream.num_predictions
    assert num_bytes == pytest.approx(stream.num_bytes)
    if not joined:
        score = evaluate_documents(model, stream)
        assert nats / tokens == pytest.approx(score.loss, rel=1e-5)
        assert nats / math.log(2) / num_bytes == pytest.approx(score.bits_per_byte, rel=1e-5)


def test_joined_documents_reach_further(stream: TokenStream, tokenizer: Tokenizer):
    model = PHASE2.model(vocab_size=257)
    alone, joined = (
        evaluate_positions(model, stream, tokenizer, length=1000, joined=joined) for joined in (False, True)
    )
    assert alone.rows[-1].last == max(map(len, document_tokens(stream))) - 1
    assert joined.rows[-1].last == stream.num_predictions
    assert joined.rows[-1].loss.standard_error is None  # a single sequence


@pytest.mark.parametrize("spec", ["bytes", "bpe", "gpt2"])
def test_bytes_of_tokens_sum_up_to_the_text(spec: str):
    texts = ["naïve 日本語 🙂 <|endoftext|>", "plain words, plain words\n\n"]
    tokenizer = build_tokenizer(spec, texts, vocab_size=270)
    sizes = token_bytes(tokenizer)
    assert sizes is not None
    stream = encode_documents(texts, tokenizer)
    for text, tokens in zip(texts, document_tokens(stream), strict=True):
        assert sizes[tokens].sum() == len(text.encode())


def test_bits_per_byte_are_omitted_for_tokens_without_fixed_bytes(stream: TokenStream, tokenizer: Tokenizer):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert token_bytes(words) is None
    scores = evaluate_positions(PHASE2.model(vocab_size=257), stream, words, length=10)
    assert {row.bits_per_byte for row in scores.rows} == {None}


@pytest.mark.parametrize("option", ["length", "sequences"])
def test_empty_text_is_an_error(stream: TokenStream, tokenizer: Tokenizer, option: str):
    model = PHASE2.model(vocab_size=257)
    with pytest.raises(ConfigError, match=f"{option} must be >= 1, got 0"):
        evaluate_positions(model, stream, tokenizer, **{option: 0})
    with pytest.raises(DataError, match="no text"):
        evaluate_positions(model, encode_documents(["", ""], tokenizer), tokenizer)


def test_a_broken_model_is_an_error(stream: TokenStream, tokenizer: Tokenizer):
    model = PHASE2.model(vocab_size=257)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ResolventError, match="not finite"):
        evaluate_positions(model, stream, tokenizer, length=10)
