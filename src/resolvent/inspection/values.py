"""Values that the inspection page shows, as plain numbers and texts.

Shapes: N tokens of the text, P positions at which the memories are recorded, H heads, K modes of a memory.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from resolvent.wording import counted

Row = list[float]


@dataclass(frozen=True)
class Curves:
    """Learning curves, from the metrics of a run.

    Attributes:
        step, bits_per_byte, grad_norm, lr: of the training steps, or means over intervals of steps.
        validation_step, validation_bits_per_byte: of the validations.
    """

    step: Row
    bits_per_byte: Row
    grad_norm: Row
    lr: Row
    validation_step: Row
    validation_bits_per_byte: Row


@dataclass(frozen=True)
class Modes:
    """The modes of a layer's memory after the text: energies relative to their mean, and gates, both (H, K)."""

    energy: list[Row]
    gate: list[Row]


@dataclass(frozen=True)
class Memory:
    """A layer's memory.

    Attributes:
        energy, bound: ``||S||²`` and its upper bound, (H, P).
        snr: share of the components in each bin of ``SNR_EDGES`` after the text, (H, bins).
        signal: share of the components above the SNR threshold, (H,); None without an SNR filter.
        strength: strength of the SNR filter, from 0 to 1, (H,); None without an SNR filter.
        modes: None without resonance.
    """

    energy: list[Row]
    bound: list[Row]
    snr: list[Row]
    signal: Row | None
    strength: Row | None
    modes: Modes | None


@dataclass(frozen=True)
class Attention:
    """The attention of a layer.

    Attributes:
        distance: number of tokens that each head looks back on average, (H, N).
        places: indices of the tokens with the largest weights, largest first, (H, N, up to 4).
        weights: their weights, (H, N, up to 4).
    """

    distance: list[Row]
    places: list[list[list[int]]]
    weights: list[list[Row]]


@dataclass(frozen=True)
class Layer:
    """A layer at every token.

    Attributes:
        real, imaginary: parts of the resolvent's g, (H, N).
        resolvent_bound: upper bound of ``|g|``, (H, N).
        gamma: decay rates, (H, N); None without dissipation.
        memory: None without a memory.
        attention: None without attention.
    """

    real: list[Row]
    imaginary: list[Row]
    resolvent_bound: list[Row]
    gamma: list[Row] | None
    memory: Memory | None
    attention: Attention | None


@dataclass(frozen=True)
class Finding:
    """A sentence about the model, and the section of the page that shows it."""

    text: str
    section: str


@dataclass(frozen=True, repr=False)
class Inspection:
    """Inspection of a model on a text.

    Attributes:
        name: name of the model.
        version: version of this package.
        facts: properties of the model, by name.
        findings: the main results, as sentences.
        curves: None without metrics.
        tokens: text of the tokens, (N,); empty for a part of a character that a later token completes.
        words: number of the word that each token belongs to, (N,); the token that opens the text is word 0.
        nats: loss of every token except the first.
        expected: the likeliest tokens at every position except the first, each with its probability.
        influence: norm of the gradient of the last token's loss in every earlier token's embedding, (N - 1,).
        places: indices of the tokens after which the memories are recorded, (P,).
        layers: the layers at every token.
        snr_edges: bins of the SNR.
        snr_threshold, resonance_threshold: thresholds; None without the mechanism.
        consolidation_interval: tokens between two consolidations; None without any.
        dt: time per token, in which a memory decays by ``1 - exp(-Γ dt)``.
    """

    name: str
    version: str
    facts: dict[str, str]
    findings: list[Finding]
    curves: Curves | None
    tokens: list[str]
    words: list[int]
    nats: Row
    expected: list[list[tuple[str, float]]]
    influence: Row
    places: list[int]
    layers: list[Layer]
    snr_edges: Row
    snr_threshold: float | None
    resonance_threshold: float | None
    consolidation_interval: int | None
    dt: float

    def __repr__(self) -> str:
        return f"Inspection({self.name!r}, {counted(len(self.tokens), 'token')}, {counted(len(self.layers), 'layer')})"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Losses of two models on the same words.

    Attributes:
        words: the words, each with the spaces before it.
        nats: loss of every word, one row per model.
        bits_per_byte: loss over all these words, one per model.
    """

    words: list[str]
    nats: list[Row]
    bits_per_byte: Row
