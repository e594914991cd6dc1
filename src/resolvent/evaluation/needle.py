"""Recall of a fact hidden in text, by the distance between the fact and the question."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from resolvent.data import TokenStream
from resolvent.errors import ConfigError, check_at_least
from resolvent.evaluation.scoring import (
    Advance,
    excerpts,
    progress_bar,
    rectangle,
    score_tokens,
    separator_of,
)
from resolvent.evaluation.statistics import Estimate, doubling
from resolvent.models import IntegratedModel
from resolvent.models.inference import inference_view
from resolvent.models.state import ModelState
from resolvent.native import panics_are_errors
from resolvent.seeds import check_seed

FACT = "\nThe pass key is {key}. Remember it: the pass key is {key}.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER = " {key}"

NEAREST = 16
"""Tokens between the fact and the first question."""
_LEAD = 128
"""The fact comes after fewer tokens of text than this."""
PASS_KEYS = range(10_000, 100_000)


@dataclass(frozen=True)
class NeedleScore:
    """Recall of a fact over a distance.

    Attributes:
        distance: tokens of other text between the fact and the question.
        first: share of the samples in which the true key is likelier than every other candidate.
        beaten: share of the other candidates whose log-likelihood rose less than that of the true key since before the
            fact; by chance one half. The prior preference of a model for some keys cancels.
        exact: share of the samples in which greedy decoding writes the key.
    """

    distance: int
    first: Estimate
    beaten: Estimate
    exact: Estimate


@dataclass(frozen=True, repr=False)
class NeedleScores:
    """The scores at all distances.

    Attributes:
        training_length: tokens of the sequences that the model was trained on.
        samples: number of positions in the text, each with its own key.
        candidates: number of keys, one of them true.
        rows: score per distance.
    """

    training_length: int
    samples: int
    candidates: int
    rows: list[NeedleScore]

    def __repr__(self) -> str:
        return f"NeedleScores({self.samples} samples, {len(self.rows)} rows up to distance {self.rows[-1].distance:,})"

    @property
    def chance(self) -> float:
        """Probability that a random guess is the true key."""
        return 1 / self.candidates

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return {**dataclasses.asdict(self), "chance": self.chance}


@dataclass(frozen=True)
class _Haystack:
    """Samples, read side by side.

    Attributes:
        leads: tokens before the fact, per sample.
        facts: tokens of the fact, per sample.
        filler: tokens after the fact, int64 (B, longest distance).
        question: int64 (Q,).
        answers: candidates of every sample, the true one first.
    """

    leads: list[np.ndarray]
    facts: list[np.ndarray]
    filler: Tensor
    question: Tensor
    answers: list[list[np.ndarray]]

    def __getitem__(self, rows: slice) -> "_Haystack":
        return _Haystack(self.leads[rows], self.facts[rows], self.filler[rows], self.question, self.answers[rows])

    @property
    def answers_read(self) -> int:
        """Number of tokens of one question to all samples."""
        return sum(len(self.question) + sum(map(len, answers)) for answers in self.answers)


def evaluate_needle(
    model: IntegratedModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    length: int = 65536,
    samples: int = 32,
    candidates: int = 32,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> NeedleScores:
    """Measure recall of a pass key within a text at doubling distances.

    A sample is read once: at every distance the question follows a copy of the state. So all distances share their
    samples, and memory does not grow with their number. A sample is the separator of documents, 0 to 127 tokens of the
    text, the fact, and the next tokens of the text up to the distance.

    Args:
        model: the model; it keeps its mode, and dropout is off.
        stream: the text around the fact.
        tokenizer: its tokenizer.
        length: longest distance in tokens, at least 16, the shortest.
        samples: number of positions in the text, each with its own key.
        candidates: number of keys of the same form that are ranked, including the true one.
        seed: seed of positions and keys.
        batch_tokens: most tokens in one call of the model, except for questions.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a number is out of range.
        DataError: the text is too short.
        ResolventError: the model's predictions are not finite.
    """
    check_seed(seed)
    check_at_least(1, samples=samples)
    if not 2 <= candidates <= len(PASS_KEYS):
        raise ConfigError(f"candidates must be between 2 and {len(PASS_KEYS):,}, got {candidates}")
    model = inference_view(model)
    distances = doubling(NEAREST, length)
    haystack = _hide(stream, tokenizer, length, samples, candidates, np.random.default_rng(seed))
    lanes = max(1, batch_tokens // (2 * _LEAD))
    total = samples * length + (1 + len(distances)) * haystack.answers_read
    scores = []
    with progress_bar("Reading", total, progress) as advance, torch.inference_mode():
        for start in range(0, samples, lanes):
            part = haystack[start : start + lanes]
            scores.append(np.stack(list(_ask_along(model, part, distances, batch_tokens, advance))))
    first, beaten, exact = np.moveaxis(np.concatenate(scores, axis=1), -1, 0)  # each (distances, samples)
    rows = [
        NeedleScore(distance, Estimate.of(first[i]), Estimate.of(beaten[i]), Estimate.of(exact[i]))
        for i, distance in enumerate(distances)
    ]
    return NeedleScores(model.n_seq, samples, candidates, rows)


def _hide(
    stream: TokenStream, tokenizer: Tokenizer, length: int, samples: int, candidates: int, random: np.random.Generator
) -> _Haystack:
    def encode(text: str) -> np.ndarray:
        with panics_are_errors():
            return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    texts = excerpts(stream, samples, _LEAD - 1 + length, random)
    separator = np.array([separator_of(stream)])
    leads, facts, fillers, answers = [], [], [], []
    for text in texts:
        keys = PASS_KEYS.start + random.choice(len(PASS_KEYS), candidates, replace=False)
        lead = int(random.integers(_LEAD))
        leads.append(np.concatenate([separator, text[:lead]]))
        facts.append(encode(FACT.format(key=keys[0])))
        fillers.append(text[lead : lead + length])
        answers.append([encode(ANSWER.format(key=key)) for key in keys])
    question = torch.from_numpy(encode(QUESTION))
    return _Haystack(leads, facts, torch.from_numpy(np.stack(fillers)), question, answers)


def _ask_along(
    model: IntegratedModel, haystack: _Haystack, distances: list[int], batch_tokens: int, advance: Advance
) -> Iterator[np.ndarray]:
    """Read the samples side by side and return the scores (B, 3) at every distance.

    The scores are: ranked first, candidates beaten, written exactly.
    """
    state = _read_ragged(model, haystack.leads, None)
    before, _ = _ask(model, haystack, state)
    advance(haystack.answers_read)
    state = _read_ragged(model, haystack.facts, state)
    piece_tokens, position = max(1, batch_tokens // len(haystack.facts)), 0
    for distance in distances:
        for piece in haystack.filler[:, position:distance].split(piece_tokens, dim=1):
            _, state = model.hidden_states(piece.to(state.device), state=state)
            advance(piece.numel())
        position = distance
        nats, exact = _ask(model, haystack, state)
        first, beaten = [rank(row)[0] for row in nats], [rank(row)[1] for row in nats - before]
        yield np.stack([first, beaten, exact], axis=1)
        advance(haystack.answers_read)


def _ask(model: IntegratedModel, haystack: _Haystack, state: ModelState) -> tuple[np.ndarray, np.ndarray]:
    """Return the nats of every sample's candidates (B, C), and whether greedy decoding writes the first one (B,)."""
    device, question = state.device, haystack.question
    _, state = model.hidden_states(question[:-1].expand(len(haystack.answers), -1).to(device), state=state)
    nats, exact = [], []
    for row, answers in enumerate(haystack.answers):
        # The last token of the question begins every row, so that the first token of a candidate is predicted, too.
        inputs, labels = rectangle([np.append(question[-1], answer) for answer in answers])
        hidden, _ = model.hidden_states(inputs.to(device), state=state[[row]].repeat(len(answers)))
        scores = score_tokens(model, hidden, labels.to(device))
        nats.append(scores.nats.double().sum(dim=1).cpu().numpy())
        exact.append(float(scores.likeliest[0].all()))
    return np.stack(nats), np.array(exact)


def _read_ragged(model: IntegratedModel, rows: list[np.ndarray], state: ModelState | None) -> ModelState:
    """Return the state after token sequences of different lengths."""
    device = next(model.parameters()).device
    tokens = pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    return model.hidden_states(tokens, state=state, attention_mask=mask)[1]


def rank(nats: np.ndarray) -> tuple[float, float]:
    """Compare the first candidate with the others.

    Returns whether its nats are the fewest, and the share of the others that have more. A tie counts as its expectation
    under a random order.
    """
    true, others = nats[0], nats[1:]
    if not np.isfinite(nats).all():
        return np.nan, np.nan
    ties = int((others == true).sum())
    first = 0.0 if (others < true).any() else 1 / (1 + ties)
    return first, float(((others > true).sum() + ties / 2) / len(others))
