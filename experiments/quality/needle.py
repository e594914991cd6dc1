"""Recall over a distance: training on text with facts and questions, and tests up to 64 times as far.

The text, the entries and the training are those of ``language``. But in every sequence stretches of the text are
overwritten by facts. A question with its answer follows each fact after more of the text, before the next fact.
After training, a fact in held-out text is asked for at distances up to far beyond the training length, always with the
whole sequence in one forward pass, from a fresh start.

Shapes: B sequences of a step, N tokens of a training sequence, Q questions in it, F tokens of a fact, A of an answer,
W of a question with its answer, K keys, S samples.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from experiments.quality import language
from experiments.quality.language import Plan, Text
from experiments.quality.models import Entry
from experiments.quality.training import Clock, Mode
from resolvent.evaluation.needle import ANSWER, FACT, NEAREST, PASS_KEYS, QUESTION
from resolvent.evaluation.scoring import score_tokens
from resolvent.evaluation.statistics import Estimate
from resolvent.models.inference import evaluating

QUESTIONS = 6
"""In a training sequence."""
LEAD = 64
"""Tokens of text before the fact in a test."""
FORWARD_TOKENS = 2**17
"""Most tokens of a test in one forward pass, unless a single sequence has more."""
_TRAINING, _TEST = 1, 2  # what keeps their random numbers apart


# -------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Phrases:
    """Facts and questions as tokens, for all keys of the most common length in tokens.

    Attributes:
        facts: int64 (K, F).
        questions: with their answers, int64 (K, W).
        answer: A, the tokens at the end of a question that answer it.
    """

    facts: NDArray[np.int64]
    questions: NDArray[np.int64]
    answer: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Phrases:
        """Return the phrases of all keys that the tokenizer can write."""

        def encode(template: str) -> list[list[int]]:
            texts = [template.format(key=key) for key in PASS_KEYS]
            return [code.ids for code in tokenizer.encode_batch(texts, add_special_tokens=False)]

        facts, answers = encode(FACT), encode(ANSWER)
        question = tokenizer.encode(QUESTION, add_special_tokens=False).ids
        lengths = [(len(fact), len(answer)) for fact, answer in zip(facts, answers, strict=True)]
        ((most, _),) = Counter(lengths).most_common(1)
        kept = [key for key, length in enumerate(lengths) if length == most]
        return cls(np.array([facts[key] for key in kept]), np.array([question + answers[key] for key in kept]), most[1])

    @property
    def tokens(self) -> int:
        """Of a fact and its question, F + W."""
        return self.facts.shape[1] + self.questions.shape[1]


@dataclass(frozen=True)
class Probe:
    """Test of a trained model.

    Attributes:
        longest: no distance has more tokens.
        samples: keys, each with a position in the held-out text, the same for all distances and models.
    """

    longest: int = 65536
    samples: int = 64

    @property
    def distances(self) -> list[int]:
        """Each four times the one before it."""
        return [NEAREST << 2 * i for i in range(32) if NEAREST << 2 * i <= self.longest]

    def sequences(self, phrases: Phrases, text: NDArray[np.int64], distance: int) -> Tensor:
        """Return sequences of text, fact, more text, and the question with its answer: int64 (S, N).

        Args:
            phrases: to write into the text.
            text: int64 (T,); where it ends, it begins again.
            distance: tokens of text between fact and question.
        """
        random = np.random.default_rng(_TEST)
        starts = random.integers(len(text), size=(self.samples, 1))
        keys = random.integers(len(phrases.facts), size=self.samples)
        around = text[(starts + np.arange(LEAD + distance)) % len(text)]
        parts = [around[:, :LEAD], phrases.facts[keys], around[:, LEAD:], phrases.questions[keys]]
        return torch.from_numpy(np.concatenate(parts, axis=1))


def draw_distances(rows: int, tokens: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return distances (rows, Q) that take up to ``tokens`` together, in random order.

    They are drawn one after the other, log-uniform, from the nearest to the farthest that leaves enough tokens for the
    others.
    """
    left, drawn = np.full(rows, tokens), np.empty((rows, QUESTIONS), np.int64)
    for i in range(QUESTIONS):
        farthest = left - NEAREST * (QUESTIONS - 1 - i)
        drawn[:, i] = np.exp(random.uniform(math.log(NEAREST), np.log(farthest + 1)))
        left -= drawn[:, i]
    return random.permuted(drawn, axis=1)


def draw_step(
    phrases: Phrases, batch: int, length: int, seed: int, step: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens that replace text in the windows of a step, and their positions, (B, Q (F + W)).

    Raises:
        ValueError: the questions do not fit in the windows.
    """
    random, fact = np.random.default_rng([_TRAINING, seed, step]), phrases.facts.shape[1]
    free = length + 1 - QUESTIONS * phrases.tokens
    if free < QUESTIONS * NEAREST:
        least = QUESTIONS * (phrases.tokens + NEAREST) - 1
        raise ValueError(f"{QUESTIONS} questions take sequences of {least} tokens and more, got {length}")
    distances = draw_distances(batch, free, random)
    spare = free - distances.sum(axis=1, keepdims=True)  # text before, between and behind the facts and their questions
    gaps = np.sort(random.integers(spare + 1, size=distances.shape), axis=1)
    taken = np.cumsum(phrases.tokens + distances, axis=1)
    ends = (gaps + taken)[..., None]
    facts = ends - distances[..., None] - phrases.tokens + np.arange(fact)
    questions = ends + np.arange(fact - phrases.tokens, 0)
    keys = random.integers(len(phrases.facts), size=distances.shape)
    positions = np.concatenate([facts, questions], axis=-1)
    tokens = np.concatenate([phrases.facts[keys], phrases.questions[keys]], axis=-1)
    return positions.reshape(batch, -1), tokens.reshape(batch, -1)


# ----------------------------------------------------------------------------------------------------------- a run


class Experiment(language.Experiment):
    """One entry that learns from a text with questions, prepared once for all seeds and learning rates.

    Args:
        entry: on the device.
        text: to learn from and, its held-out part, to be tested on.
        plan: what to do.
        mode: how steps run.
        phrases: of the text's tokenizer.
        probe: what comes after the training.
        switching: whether to measure Phase 2 with each of its mechanisms off.
    """

    def __init__(
        self,
        entry: Entry,
        text: Text,
        plan: Plan,
        mode: Mode,
        phrases: Phrases,
        probe: Probe,
        switching: bool = True,
    ) -> None:
        self.phrases, self.probe = phrases, probe
        self.held_out = np.concatenate(text.validation).astype(np.int64)
        device = next(entry.model.parameters()).device
        shape = (plan.steps, plan.batch, QUESTIONS * phrases.tokens)
        self.positions, self.written = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        super().__init__(entry, text, plan, mode, switching=switching)

    @cached_property
    def seconds(self) -> float:
        """Approximate duration of a run, with its validations and its test."""
        longest = self.probe.sequences(self.phrases, self.held_out, self.probe.distances[-1])[:1]
        started = time.perf_counter()
        for _ in range(2):  # the first one includes one-time preparations
            started = time.perf_counter()
            self._ask(longest)
        # A distance costs at most a quarter of the next one.
        return super().seconds + 4 / 3 * self.probe.samples * (time.perf_counter() - started)

    def run(self, learning_rate: float, seed: int, clock: Clock) -> dict[str, Any]:
        """Train, validate and test; return the results.

        Raises:
            OutOfTimeError: the run would not end in time.
        """
        record = super().run(learning_rate, seed, clock)
        finite, distances = record["finite"], self.probe.distances
        near = [distance for distance in distances if distance <= self.plan.length]
        return record | {
            "needle": self._recall(distances) if finite else None,
            "needle_without": self._without_each(lambda: self._recall(near)) if finite else None,
        }

    def _draw(self, seed: int) -> None:
        super()._draw(seed)
        plan = self.plan
        steps = [draw_step(self.phrases, plan.batch, plan.length, seed, step) for step in range(plan.steps)]
        for kept, drawn in zip((self.positions, self.written), zip(*steps, strict=True), strict=True):
            kept.copy_(torch.from_numpy(np.stack(drawn)))

    def _window(self, step: Tensor) -> Tensor:
        positions, written = (x.index_select(0, step).squeeze(0) for x in (self.positions, self.written))
        return super()._window(step).scatter(1, positions, written)

    def _recall(self, distances: Sequence[int]) -> dict[str, dict[str, float | None]]:
        """Return the scores by distance."""
        found = {}
        for distance in distances:
            found[str(distance)] = summary(*self._ask(self.probe.sequences(self.phrases, self.held_out, distance)))
        return found

    def _ask(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        return ask(self.entry.model, sequences.to(self.device), self.phrases.answer, self.trainer.evaluating())


@torch.no_grad()
def ask(model: Any, sequences: Tensor, answer: int, context: torch.autocast) -> tuple[Tensor, Tensor]:
    """Score the predictions of the last ``answer`` tokens of sequences (S, N), each after the true ones.

    Returns their nats together, float64 (S,), and whether every one was the likeliest, bool (S,), both on the CPU.
    Nothing is compiled.
    """
    nats, exact = [], []
    with evaluating(model), context, torch.compiler.set_stance("force_eager"):
        for part in sequences.split(max(1, FORWARD_TOKENS // sequences.shape[1])):
            hidden, _ = model.hidden_states(part[:, :-1])
            scores = score_tokens(model, hidden[:, -answer:], part[:, -answer:])
            nats.append(scores.nats.double().sum(dim=1))
            exact.append((scores.likeliest & scores.nats.isfinite()).all(dim=1))
    return torch.cat(nats).cpu(), torch.cat(exact).cpu()


def summary(nats: Tensor, exact: Tensor) -> dict[str, float | None]:
    """Return the share of exact answers (S,) with its standard error, and the mean nats of an answer.

    The nats are None where they are not finite.
    """
    share, mean = Estimate.of(exact.double().tolist()), nats.mean().item()
    return {
        "exact": share.mean,
        "exact_error": share.standard_error,
        "nats": mean if math.isfinite(mean) else None,
    }


def settings(plan: Plan, text: Text, probe: Probe) -> dict[str, Any]:
    """Return the settings that comparable runs share."""
    return language.settings(plan, text) | {"task": "needle", "questions": QUESTIONS} | asdict(probe)
