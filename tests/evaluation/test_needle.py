from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from resolvent.data import TokenStream, build_tokenizer, encode_documents
from resolvent.errors import ConfigError, DataError
from resolvent.evaluation import evaluate_needle
from resolvent.evaluation.needle import QUESTION, rank
from tests.models.small import PHASE1, PHASE2, SmallPhase

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz ,\n"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("bytes", [])


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer) -> TokenStream:
    random = np.random.default_rng(0)
    return encode_documents(["".join(random.choice(LETTERS, 900)) for _ in range(3)], tokenizer)


@dataclass(frozen=True)
class History:
    """All tokens of every sequence."""

    rows: list[list[int]]
    device = torch.device("cpu")

    def __getitem__(self, rows: list[int]) -> "History":
        return History([self.rows[row] for row in rows])

    def repeat(self, times: int) -> "History":
        return History([row for row in self.rows for _ in range(times)])


class Copier(nn.Module):
    """Expects what followed the last six tokens when they occurred before, among the last ``reach`` tokens."""

    def __init__(self, reach: int, certainty: float = 9.0, liking: float = 0.0):
        super().__init__()
        self.reach, self.certainty, self.n_seq, self.vocab_size = reach, certainty, 64, 257
        self.liking = liking * torch.randn(257)
        self.lm_head = nn.Identity()
        self.unused = nn.Parameter(torch.zeros(()))

    def hidden_states(self, ids: Tensor, *, state: Any = None, attention_mask: Any = None) -> tuple[Tensor, History]:
        rows = [list(row) for row in state.rows] if state is not None else [[] for _ in ids]
        logits = self.liking.repeat(*ids.shape, 1)
        for i, (row, tokens) in enumerate(zip(rows, ids.tolist(), strict=True)):
            for j, token in enumerate(tokens):
                if attention_mask is None or attention_mask[i, j]:
                    row.append(token)
                    if (follower := self.follower(bytes(x % 256 for x in row[-self.reach :]))) is not None:
                        logits[i, j, follower] += self.certainty
        return logits, History(rows)

    def follower(self, seen: bytes) -> int | None:
        place = seen[:-1].rfind(seen[-6:])
        return seen[place + 6] if place >= 0 else None


def test_recall_ends_at_the_reach_of_a_model(stream: TokenStream, tokenizer: Tokenizer):
    """It copies the key from the fact's last sentence as long as that is in reach, with the six letters before it."""
    from_key_to_answer = len(QUESTION) + len(" is 1234512345.\n")
    copier = Copier(reach=64 + from_key_to_answer)
    scores = evaluate_needle(copier, stream, tokenizer, length=300, samples=12, candidates=8)
    assert [row.distance for row in scores.rows] == [16, 32, 64, 128, 256, 300]
    assert scores.chance == 1 / 8
    for row in scores.rows:
        if row.distance <= 64:
            assert (row.first.mean, row.beaten.mean, row.exact.mean) == (1, 1, 1)
        else:  # a uniform guess: all candidates are equally likely
            assert (row.first.mean, row.beaten.mean, row.exact.mean) == (pytest.approx(1 / 8), 0.5, 0)


def test_weak_recall_is_measured_despite_prior_preferences(stream: TokenStream, tokenizer: Tokenizer):
    model = Copier(reach=1000, certainty=0.01, liking=2.0)
    row = evaluate_needle(model, stream, tokenizer, length=16, samples=12, candidates=8).rows[0]
    assert row.beaten.mean == 1
    assert row.first.mean < 0.5 and row.exact.mean == 0


@pytest.mark.parametrize("phase", [PHASE1, PHASE2])
def test_scores_do_not_depend_on_pieces_and_batches(phase: SmallPhase, stream: TokenStream, tokenizer: Tokenizer):
    model = phase.model(vocab_size=257)
    scores = [
        evaluate_needle(model, stream, tokenizer, length=80, samples=4, candidates=5, batch_tokens=batch_tokens)
        for batch_tokens in (30, 600, 4096)
    ]
    assert scores[0] == scores[1] == scores[2]


def test_uniform_model_scores_at_chance(stream: TokenStream, tokenizer: Tokenizer):
    """A fresh model prefers some keys to others, but not the true ones."""
    scores = evaluate_needle(PHASE2.model(vocab_size=257), stream, tokenizer, length=16, samples=60, candidates=8)
    (row,) = scores.rows
    assert row.beaten.standard_error is not None
    assert abs(row.beaten.mean - 0.5) < 4 * row.beaten.standard_error
    assert 0.22 / 60**0.5 < row.beaten.standard_error < 0.5 / 60**0.5  # ranks are no narrower than uniform ones
    assert row.exact.mean == 0


def test_seed_decides_the_result(stream: TokenStream, tokenizer: Tokenizer):
    model = PHASE2.model(vocab_size=257)
    first, again, other = (
        evaluate_needle(model, stream, tokenizer, length=20, samples=4, candidates=5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("nats", "expected"),
    [
        ([1, 2, 3], (1, 1)),
        ([2, 1, 3], (0, 0.5)),
        ([3, 1, 2], (0, 0)),
        ([1, 1, 2], (1 / 2, 0.75)),
        ([1, 1, 1], (1 / 3, 0.5)),
    ],
)
def test_ties_count_as_their_expectation(nats: list[float], expected: tuple[float, float]):
    assert rank(np.array(nats, float)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 15}, "length must be >= 16, got 15"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        ({"candidates": 1}, "candidates must be between 2 and 90,000, got 1"),
        ({"candidates": 90_001}, "got 90001"),
    ],
)
def test_wrong_numbers_are_errors(stream: TokenStream, tokenizer: Tokenizer, options: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        evaluate_needle(PHASE2.model(vocab_size=257), stream, tokenizer, **options)


def test_error_names_the_length_of_a_short_text(stream: TokenStream, tokenizer: Tokenizer):
    with pytest.raises(DataError, match="the text has 2,700 tokens, a sequence needs 65,663"):
        evaluate_needle(PHASE2.model(vocab_size=257), stream, tokenizer)
