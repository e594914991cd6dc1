"""Multi-query associative recall (Arora et al., 2024), with Zoology's task and protocol.

A sequence starts with pairs of a key and a value, all different. After them every key occurs once more, at positions
drawn from a power law, and its value has to be predicted. All other tokens are random and may be keys or values.

A model has two layers: a gated short convolution, and the mixer that is measured. A hybrid has three, of which the
last attends. There is no feed-forward part, the head is the embedding's table, products are in float32. Batches are
of one length and number of pairs, and come in another order each pass; the learning rate falls from its peak to zero
in a cosine, one step per pass, without warm-up and clipping. Only positions with an answer are predicted, so only
their logits are computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from experiments.quality.accuracy import AccuracyExperiment
from experiments.quality.mixers import GLA, Attention, GatedDeltaNet, Mamba2, Mixer, reset_conv, short_conv
from experiments.quality.models import Entry, PeerModel, Size, phase2_state_bytes
from experiments.quality.training import Clock, Mode, Trainer
from experiments.quality.variants import parse_variant
from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.ops import linear_cross_entropy

LEARNING_RATES = tuple(10 ** (-3 + 0.5 * i) for i in range(4))
POWER = 0.01
_TEST_SEED = 1_000_000


# -------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Slice:
    """Sequences of one length with one number of pairs."""

    length: int
    pairs: int
    examples: int

    def __str__(self) -> str:
        return f"{self.length}x{self.pairs}"


@dataclass(frozen=True)
class Recall:
    """Sequences with their queries and answers.

    Attributes:
        inputs: tokens, int32 (E, N).
        positions: where the keys come again, in the order of the pairs, int64 (E, P).
        answers: the tokens that should follow there, int64 (E, P).
    """

    inputs: Tensor
    positions: Tensor
    answers: Tensor


TRAIN = (
    Slice(64, 4, 100_000),
    Slice(128, 8, 20_000),
    Slice(256, 16, 20_000),
    Slice(256, 32, 20_000),
    Slice(256, 64, 20_000),
)
TEST = (
    Slice(64, 4, 1000),
    Slice(64, 8, 1000),
    Slice(64, 16, 1000),
    Slice(128, 32, 1000),
    Slice(256, 64, 1000),
    Slice(512, 128, 1000),
    Slice(1024, 256, 1000),
)


def generate(part: Slice, vocabulary: int, generator: torch.Generator) -> Recall:
    """Draw sequences where the generator is.

    The first half of the vocabulary, but for 0, are keys, and the second half values; both are drawn without
    replacement. Behind the P pairs there are ``(N - 2P) / 2`` gaps, of which the keys take P without replacement, the
    i-th with a probability in proportion to ``i ** (POWER - 1)``.

    Raises:
        ValueError: the pairs and their queries do not fit in the length, or the vocabulary is too small.
    """
    length, pairs, count, device = part.length, part.pairs, part.examples, generator.device
    if length % 2 or 4 * pairs > length or pairs >= vocabulary // 2:
        raise ValueError(f"{pairs} pairs need an even length >= {4 * pairs} and a vocabulary > {2 * pairs}, got {part}")
    half, context = vocabulary // 2, 2 * pairs

    def distinct(weights: Tensor) -> Tensor:
        return torch.cat(
            [torch.multinomial(w, pairs, generator=generator) for w in weights.expand(count, -1).split(4096)]
        )

    keys = 1 + distinct(torch.ones(half - 1, device=device))
    values = half + distinct(torch.ones(vocabulary - half, device=device))
    ranks = torch.arange(1, (length - context) // 2 + 1, device=device, dtype=torch.float64)
    positions = context + 2 * distinct(ranks ** (POWER - 1))
    inputs = torch.randint(vocabulary, (count, length), generator=generator, device=device)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    inputs.scatter_(1, positions, keys)
    return Recall(inputs.int(), positions, values)


# ------------------------------------------------------------------------------------------------------ the models


class ConvolvedEmbedding(nn.Embedding):
    """A token embedding with the first layer behind it: ``x + (conv(u) * W u + u)`` of the normalised x, ``u``.

    Args:
        vocabulary, width: of the table.
        dropout: of the embedding.
        taps: tokens that the convolution spans.
    """

    def __init__(self, vocabulary: int, width: int, dropout: float = 0.1, taps: int = 3) -> None:
        super().__init__(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.projection = nn.Linear(width, width)
        self.conv_weight = nn.Parameter(torch.empty(taps, width))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.dropout(super().forward(input_ids))
        u = self.norm(x)
        return x + short_conv(u, self.conv_weight) * self.projection(u) + u

    @torch.no_grad()
    def reset_layer(self, generator: torch.Generator) -> None:
        """Initialise the parameters that the models do not initialise."""
        reset_conv(self.conv_weight)
        self.norm.weight.fill_(1.0)


class NoFeedForward(nn.Module):
    """Feed-forward part that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


MIXERS: dict[str, Callable[[int, int], Mixer]] = {
    "attention": lambda width, heads: Attention(width, 1),
    "gla": lambda width, heads: GLA(width, heads),
    "mamba2": lambda width, heads: Mamba2(width, head_dim=width // heads, state=width // heads),
    "gated-deltanet": lambda width, heads: GatedDeltaNet(width, heads, expand=2),
}
"""Mixers of a width and a number of heads, as Zoology has them, but for Mamba-2, whose state is as large as Gated
DeltaNet's. Phase 2 comes as a block without feed-forward part; as `phase2/.../wide` with twice the heads, and as
`phase2/.../wide-30` with twice the heads of width 30, say."""
_WIDE = re.compile(r"/wide(?:-(\d+))?$")


def build(name: str, width: int, heads: int, vocabulary: int, device: torch.device | str = "cpu") -> Entry:
    """Build a model of two layers, with uninitialised weights.

    Raises:
        ValueError: there is none of this name.
    """
    size = Size(vocabulary, width, 1, 0, TEST[-1].length)
    if name in MIXERS:
        model: Any = PeerModel(size, lambda _: MIXERS[name](width, heads), 0, embedding_factor=1.0)
        state_bytes, draw = model.state_bytes(size.length), model.reset
    elif name.partition("/")[0] == "phase2":
        model, draw = _phase2(name, width, heads, vocabulary, size.length)
        state_bytes = phase2_state_bytes(model, size.length)
    else:
        raise ValueError(
            f"there is no model {name!r}; known are {', '.join(MIXERS)}, phase2 and its variants phase2/..."
        )
    embedding = ConvolvedEmbedding(vocabulary, width)
    if model.lm_head.weight is model.token_embedding.weight:
        model.lm_head.weight = embedding.weight
    model.token_embedding = embedding

    def reset(seed: int) -> None:
        draw(seed)
        embedding.reset_layer(torch.Generator().manual_seed(seed))

    model.to(device)
    return Entry(name, model, reset, state_bytes)


def _phase2(
    name: str, width: int, heads: int, vocabulary: int, length: int
) -> tuple[Phase2IntegratedModel, Callable[[int], None]]:
    """Return a variant of Phase 2 without feed-forward part, and the function that draws its weights from a seed."""
    wide, variant = _WIDE.search(name), parse_variant(_WIDE.sub("", name))
    layers = 3 if variant.attends == "hybrid" else 1
    variant = variant.at(layers, length)
    model = variant.build(
        vocab_size=vocabulary,
        d_model=width,
        n_layers=layers,
        n_seq=length,
        num_heads=2 * heads if wide else heads,
        head_dim=int(wide[1]) if wide and wide[1] else width // heads,
        dropout=0.0,
        embedding_scale=1.0,
        ffn_dim=1,
        tie_embeddings=True,
    )
    for block in model.blocks:
        block.ffn = NoFeedForward()
    return model, lambda seed: variant.reset(model, seed)


# ----------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Plan:
    """Settings that all runs of a comparison share.

    Attributes:
        epochs: passes over the training sequences; the paper has 32.
        batch: sequences of a step.
        part: of the training sequences that are drawn at all.
        vocabulary: tokens.
        train, test: lengths, pairs and numbers of sequences.
    """

    epochs: int = 32
    batch: int = 256
    part: float = 1.0
    vocabulary: int = 8192
    train: tuple[Slice, ...] = TRAIN
    test: tuple[Slice, ...] = TEST

    @property
    def batches(self) -> list[int]:
        """Whole batches of every slice."""
        return [int(part.examples * self.part) // self.batch for part in self.train]

    @property
    def steps(self) -> int:
        return self.epochs * sum(self.batches)

    def rates(self, peak: float) -> Tensor:
        """Return the learning rates of all steps: a cosine that falls after each pass, (steps,)."""
        epochs = torch.arange(self.epochs)
        return (peak * (1 + torch.cos(math.pi * epochs / self.epochs)) / 2).repeat_interleave(sum(self.batches))

    def order(self, seed: int) -> tuple[list[int], Tensor]:
        """Return the slice of every step, and the number of its batch within the slice, (steps,)."""
        pairs = torch.tensor([(kind, i) for kind, count in enumerate(self.batches) for i in range(count)])
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.cat([pairs[torch.randperm(len(pairs), generator=generator)] for _ in range(self.epochs)])
        return shuffled[:, 0].tolist(), shuffled[:, 1].contiguous()


class Experiment(AccuracyExperiment):
    """Recall of one entry, prepared once for all seeds and learning rates.

    Args:
        entry: on the device.
        plan: what to do.
        mode: how steps run.
        data: of ``draw``.
    """

    def __init__(self, entry: Entry, plan: Plan, mode: Mode, data: tuple[list[Recall], list[Recall]]) -> None:
        super().__init__(entry)
        self.plan, (self.train, self.test) = plan, data
        device = next(entry.model.parameters()).device
        self.numbers = torch.zeros(plan.steps, dtype=torch.int64, device=device)
        entry.reset(0)
        losses = [lambda step, recall=recall: self._loss(step, recall) for recall in self.train]
        self.trainer = Trainer(entry.model, losses, plan.steps, mode, clip=None)

    @cached_property
    def seconds(self) -> float:
        """Approximate duration of a run, without its test."""
        return self.trainer.seconds(self.plan.order(0)[0])

    def draw(self, seed: int) -> list[int]:
        kinds, numbers = self.plan.order(seed)
        self.numbers.copy_(numbers)
        return kinds

    def rates(self, peak: float) -> Tensor:
        return self.plan.rates(peak)

    def accuracies(self) -> dict[str, float]:
        return {str(part): self._accuracy(recall) for part, recall in zip(self.plan.test, self.test, strict=True)}

    def run(self, learning_rate: float, seed: int, clock: Clock) -> dict[str, Any]:
        found = super().run(learning_rate, seed, clock)
        return found | {"preparation_seconds": self.trainer.preparation_seconds}

    def _loss(self, step: Tensor, recall: Recall) -> Tensor:
        number = self.numbers.index_select(0, step)
        rows = number * self.plan.batch + torch.arange(self.plan.batch, device=number.device)
        inputs, positions, answers = (
            x.index_select(0, rows) for x in (recall.inputs, recall.positions, recall.answers)
        )
        hidden = hidden_at(self.entry.model, inputs.long(), positions)
        return linear_cross_entropy(hidden.flatten(0, 1), self.entry.model.lm_head.weight, answers.flatten())

    @torch.no_grad()
    def _accuracy(self, recall: Recall) -> float:
        """Return the share of the queries whose likeliest answer is right; logits that are not finite are wrong."""
        model, right = self.entry.model.eval(), 0
        batches = (x.split(max(1, self.plan.batch // 2)) for x in (recall.inputs, recall.positions, recall.answers))
        with self.trainer.evaluating(), torch.compiler.set_stance("force_eager"):
            for inputs, positions, answers in zip(*batches, strict=True):
                logits = model.lm_head(hidden_at(model, inputs.long(), positions))
                right += ((logits.argmax(-1) == answers) & logits.isfinite().all(-1)).sum()
        model.train()
        return int(right) / recall.answers.numel()


def hidden_at(model: Any, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Return the final hidden states (B, P, D) of tokens (B, N) at positions (B, P)."""
    hidden, _ = model.hidden_states(input_ids)
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def draw(plan: Plan, device: torch.device) -> tuple[list[Recall], list[Recall]]:
    """Draw training and test sequences, the same for all models and seeds."""
    found = []
    for parts, offset, whole in ((plan.train, 0, plan.part), (plan.test, _TEST_SEED, 1.0)):
        seeds: Sequence[int] = range(offset, offset + len(parts))
        found.append(
            [
                generate(
                    dataclasses.replace(part, examples=int(part.examples * whole)),
                    plan.vocabulary,
                    torch.Generator(device).manual_seed(seed),
                )
                for part, seed in zip(parts, seeds, strict=True)
            ]
        )
    return found[0], found[1]


def settings(plan: Plan, width: int, heads: int) -> dict[str, Any]:
    """Return the settings that comparable runs share."""
    test = [str(part) for part in plan.test]
    return {"task": "mqar", "epochs": plan.epochs, "batch": plan.batch, "part": plan.part, "width": width} | {
        "heads": heads,
        "vocabulary": plan.vocabulary,
        "test": test,
    }
