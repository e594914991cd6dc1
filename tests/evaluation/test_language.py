import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from resolvent.data import build_tokenizer, encode_documents
from resolvent.errors import DataError, ResolventError
from resolvent.evaluation import LanguageScore, evaluate_documents
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
def test_neither_pieces_nor_batches_change_the_score(
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


def test_documents_do_not_see_each_other(model: Phase2IntegratedModel, tokenizer: Tokenizer):
    together = evaluate_documents(model, DOCUMENTS, tokenizer)
    reversed_order = evaluate_documents(model, DOCUMENTS[::-1], tokenizer)
    assert together.loss == pytest.approx(reversed_order.loss, rel=1e-6)


def test_a_long_document_is_read_with_its_whole_past(model: Phase2IntegratedModel, tokenizer: Tokenizer):
    """The same text cut into documents of its own scores otherwise."""
    text = "the long one " * 40
    whole = evaluate_documents(model, [text], tokenizer, piece_tokens=64)
    cut = evaluate_documents(model, [text[i : i + 64] for i in range(0, len(text), 64)], tokenizer)
    assert abs(whole.bits_per_byte - cut.bits_per_byte) > 1e-3


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(tokenizer: Tokenizer):
    model = small_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = evaluate_documents(model, ["abcd"], tokenizer)
    assert score == LanguageScore(
        loss=pytest.approx(math.log(257)),
        perplexity=pytest.approx(257, rel=1e-5),
        bits_per_byte=pytest.approx(5 / 4 * math.log2(257)),
        tokens=5,
    )


def test_bits_are_counted_by_bytes_of_text_whatever_the_tokens():
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
def test_the_model_stays_as_it_was(model: Phase2IntegratedModel, tokenizer: Tokenizer, training: bool):
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
