"""State tracking: the value of all tokens read so far, at every position where they have one.

*Products.* A token is an element of a group, and the label of a position is the product of the tokens up to it: parity
(sums modulo 2), sums modulo 3 and 5, and the permutations of three elements, which do not commute. Every token is drawn
uniformly, so every label is uniform and a guess is right once in as many times as the group has elements.

*Sums with brackets* (``mod3-brackets``, ``mod5-brackets``). A token is a digit below n, ``+``, ``-``, ``(`` or ``)``;
a sequence is a balanced expression such as ``2 - ( 1 - ( 0 + 2 ) ) + 1``, with no bound on its depth. Wherever all
brackets are closed behind a digit or a bracket, the label is the value modulo n of the expression so far; elsewhere
there is no label. A minus in front of a bracket changes the sign of all that is in it, and the sign comes back behind
the bracket. This is the task of Deletang et al. (2022) and of Grazzi et al. (2024) without multiplication, and with a
value at every closed prefix instead of the end alone. The first digit is uniform and counts with a plus, so every label
is uniform and a guess is right once in n times.

The sequences of a training step have one length, drawn uniformly between ``shortest`` and an end that grows linearly
to ``longest`` in the first part of training. Accuracy is measured on longer sequences, over the labels of their last
positions.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from experiments.quality.accuracy import AccuracyExperiment
from experiments.quality.models import Entry, phase2_state_bytes
from experiments.quality.training import Clock, Mode, Schedule, Trainer
from experiments.quality.variants import parse_variant
from resolvent.ops import linear_cross_entropy
from resolvent.ops.cross_entropy import IGNORED

MODELS = ("phase2", "phase2/rotation")
_READ = 16
"""A training step reads a multiple of this many tokens, so that few CUDA graphs serve all lengths."""
_TEST_SEED = 1_000_000


# ------------------------------------------------------------------------------------------------------- the tasks


def cyclic(order: int) -> Tensor:
    """Return the table of sums modulo ``order``, int64 (order, order)."""
    return (torch.arange(order)[:, None] + torch.arange(order)) % order


def symmetric(points: int) -> Tensor:
    """Return the table of permutations in lexicographic order, int64 (G, G): ``table[p, q]`` applies p, and then q."""
    elements = list(itertools.permutations(range(points)))
    return torch.tensor([[elements.index(tuple(q[i] for i in p)) for q in elements] for p in elements])


def products(tokens: Tensor, table: Tensor) -> Tensor:
    """Return the product of the tokens up to each position, int64 (..., N), for tokens (..., N)."""
    state, states = torch.zeros_like(tokens[..., 0]), []
    for token in tokens.unbind(-1):
        state = table[state, token]
        states.append(state)
    return torch.stack(states, dim=-1)


@dataclass(frozen=True)
class Products:
    """Products of the elements of a group.

    Attributes:
        table: products of two elements, int64 (G, G). Element 0 is the identity.
    """

    table: Tensor

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.table)

    def sequences(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw tokens and their labels, int64 (count, length) each."""
        tokens = torch.randint(len(self.table), (count, length), generator=generator)
        return tokens, products(tokens, self.table)


@dataclass(frozen=True)
class BracketedSums:
    """Sums and differences with brackets. Tokens: the digits 0 to n - 1, and then ``+``, ``-``, ``(`` and ``)``.

    Attributes:
        order: n of the values modulo n.
        opening: probability of a bracket where a term begins.
        closing: probability that an open bracket closes behind a term.
    """

    order: int
    opening: float = 0.25
    closing: float = 0.5

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.order + 4

    def sequences(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw tokens and their labels, int64 (count, length) each.

        All brackets are closed at the last odd position, where the value is always known; if the length is even, an
        operator follows. Labels where the value is not known are ``IGNORED``.
        """
        tokens = self._expressions(count, length, generator)
        return tokens, self.values(tokens)

    def values(self, tokens: Tensor) -> Tensor:
        """Return the values of the expressions up to each position, int64 (count, N), ``IGNORED`` inside brackets."""
        plus, minus, opening, closing = range(self.order, self.order + 4)
        count, length = tokens.shape
        rows, depth = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        signs = torch.ones(count, length + 1, dtype=torch.int64)  # of every open bracket, the outermost first
        sign, value, labels = torch.ones_like(depth), torch.zeros_like(depth), torch.empty_like(tokens)
        for i, token in enumerate(tokens.unbind(-1)):
            digit, outer = token < self.order, signs[rows, depth]
            value = value + torch.where(digit, outer * sign * token, 0)
            depth = depth + (token == opening).long() - (token == closing).long()
            signs[rows, depth] = torch.where(token == opening, outer * sign, signs[rows, depth])
            sign = torch.where(token == minus, -1, torch.where((token == plus) | (token == opening), 1, sign))
            known = (depth == 0) & (digit | (token == closing))
            labels[:, i] = torch.where(known, value % self.order, IGNORED)
        return labels

    def _expressions(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw expressions, int64 (count, length): at every token, as many are left as closing all brackets needs."""
        plus, opening, closing = self.order, self.order + 2, self.order + 3
        depth, before_term = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
        tokens = torch.empty(count, length, dtype=torch.int64)
        for i in range(length):
            chance = torch.rand(count, generator=generator)
            digit = torch.randint(self.order, (count,), generator=generator)
            operator = plus + torch.randint(2, (count,), generator=generator)
            left = length - 1 + length % 2 - i  # tokens of the expression from here on
            opens = before_term & (chance < self.opening) & (left >= depth + 3)
            closes = ~before_term & (depth > 0) & ((chance < self.closing) | (left == depth))
            of_term = torch.where(opens, opening, digit)
            tokens[:, i] = torch.where(before_term, of_term, torch.where(closes, closing, operator))
            depth = depth + opens.long() - closes.long()
            before_term = opens | ~(before_term | closes)
        return tokens


Task = Products | BracketedSums

TASKS: dict[str, Task] = {
    "parity": Products(cyclic(2)),
    "mod3": Products(cyclic(3)),
    "mod5": Products(cyclic(5)),
    "s3": Products(symmetric(3)),
    "mod3-brackets": BracketedSums(3),
    "mod5-brackets": BracketedSums(5),
}


# ----------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Plan:
    """Settings that all runs of a comparison share.

    Attributes:
        task: one of TASKS.
        layers: blocks of the model.
        width: of the residual stream.
        heads: of every memory, which share the width.
        steps: of training.
        batch: sequences of a step.
        shortest, longest: least and largest length in training.
        growth: part of training in which the largest length grows.
        warmup: steps in which the learning rate rises; it falls in a cosine to a hundredth.
        weight_decay: of matrices.
        test: lengths of the test sequences.
        last: positions at the end of a test sequence whose labels count.
        examples: test sequences of a length.
    """

    task: str
    layers: int = 1
    width: int = 64
    heads: int = 2
    steps: int = 3000
    batch: int = 64
    shortest: int = 3
    longest: int = 40
    growth: float = 0.5
    warmup: int = 100
    weight_decay: float = 0.01
    test: tuple[int, ...] = (40, 128, 256)
    last: int = 16
    examples: int = 512

    @property
    def drawn(self) -> Task:
        """The task.

        Raises:
            ValueError: there is no such task.
        """
        if self.task not in TASKS:
            raise ValueError(f"there is no task {self.task!r}; known are {', '.join(TASKS)}")
        return TASKS[self.task]

    def settings(self) -> dict[str, Any]:
        """Return the settings that comparable runs share."""
        values = dataclasses.asdict(self)
        return {"task": "tracking", "group": values.pop("task"), **values, "test": list(self.test)}

    def lengths(self, generator: torch.Generator) -> list[int]:
        """Draw the length of every step."""
        grown = torch.arange(self.steps, dtype=torch.float64) / max(1.0, self.growth * self.steps)
        spans = ((self.longest - self.shortest) * grown.clamp(max=1)).floor() + 1
        drawn = torch.rand(self.steps, generator=generator, dtype=torch.float64) * spans
        return (self.shortest + drawn.long()).tolist()


def build(name: str, plan: Plan, device: torch.device | str = "cpu") -> Entry:
    """Build a variant of Phase 2 for the plan, with weights yet to be drawn.

    Raises:
        ValueError: there is none of this name.
    """
    if name.partition("/")[0] != "phase2":
        raise ValueError(f"there is no model {name!r}; known are phase2 and its variants phase2/...")
    variant = parse_variant(name).at(plan.layers, plan.longest)
    model = variant.build(
        vocab_size=plan.drawn.vocabulary,
        d_model=plan.width,
        n_layers=plan.layers,
        n_seq=plan.longest,
        num_heads=plan.heads,
        head_dim=plan.width // plan.heads,
        dropout=0.0,
    )
    model.to(device)
    return Entry(name, model, lambda seed: variant.reset(model, seed), phase2_state_bytes(model, plan.longest))


class Experiment(AccuracyExperiment):
    """State tracking of one entry, prepared once for all seeds and learning rates.

    Args:
        entry: on the device.
        plan: its settings.
        mode: mode of the steps.
        commit: of the code, for the records.
    """

    def __init__(self, entry: Entry, plan: Plan, mode: Mode, commit: str) -> None:
        super().__init__(entry)
        self.plan, self.commit = plan, commit
        device = next(entry.model.parameters()).device
        shape = (plan.steps, plan.batch, plan.longest)
        self.tokens, self.labels = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.lengths = torch.zeros(plan.steps, dtype=torch.int64, device=device)
        reads = [min(read, plan.longest) for read in range(_READ, plan.longest + _READ, _READ)]
        losses = [lambda step, read=read: self._loss(step, read) for read in reads]
        entry.reset(0)
        self.trainer = Trainer(entry.model, losses, plan.steps, mode, weight_decay=plan.weight_decay)

    @cached_property
    def seconds(self) -> float:
        """Approximate duration of a run, without its test."""
        kinds = self.draw(0)
        self.trainer.seconds(kinds[:1])  # the very first steps take longer
        return self.trainer.seconds(kinds)

    def rates(self, peak: float) -> Tensor:
        return Schedule(self.plan.steps, self.plan.warmup, 0.01).rates(peak)

    def accuracies(self) -> dict[str, float]:
        return {str(length): self._accuracy(length) for length in self.plan.test}

    def run(self, learning_rate: float, seed: int, clock: Clock) -> dict[str, Any]:
        found = super().run(learning_rate, seed, clock)
        return {"commit": self.commit, **found, "device": self.trainer.step.device.type}

    def draw(self, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        lengths = self.plan.lengths(generator)
        drawn = self.plan.drawn.sequences(self.plan.steps * self.plan.batch, self.plan.longest, generator)
        for kept, values in zip((self.tokens, self.labels), drawn, strict=True):
            kept.copy_(values.view_as(kept))
        self.lengths.copy_(torch.tensor(lengths))
        return [(length - 1) // _READ for length in lengths]

    def _loss(self, step: Tensor, read: int) -> Tensor:
        """Return the loss of the step's first tokens: models are causal, so that reading more changes nothing."""
        tokens, labels = (x.index_select(0, step)[0, :, :read] for x in (self.tokens, self.labels))
        counts = torch.arange(read, device=step.device) < self.lengths.index_select(0, step)
        labels = labels.masked_fill(~counts, IGNORED)
        hidden, _ = self.entry.model.hidden_states(tokens)
        return linear_cross_entropy(hidden.flatten(0, 1), self.entry.model.lm_head.weight, labels.flatten())

    @torch.no_grad()
    def _accuracy(self, length: int) -> float:
        """Return the part of the last labels whose likeliest token is right; none where the model is not finite."""
        model, last, right = self.entry.model.eval(), min(self.plan.last, length), 0
        generator = torch.Generator().manual_seed(_TEST_SEED + length)
        tokens, labels = self.plan.drawn.sequences(self.plan.examples, length, generator)
        batches = (x.to(self.tokens.device).split(self.plan.batch) for x in (tokens, labels))
        with self.trainer.evaluating(), torch.compiler.set_stance("force_eager"):
            for read, wanted in zip(*batches, strict=True):
                logits = model.lm_head(model.hidden_states(read)[0][:, -last:])
                right += ((logits.argmax(-1) == wanted[:, -last:]) & logits.isfinite().all(-1)).sum()
        model.train()
        return int(right) / int((labels[:, -last:] != IGNORED).sum())
