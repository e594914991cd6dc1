"""Contents of the inspection page, as plain values.

Shapes: N tokens of the text, P positions at which the memories are recorded, H heads, K modes of a memory.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from resolvent._version import __version__
from resolvent.data.detokenization import TextStream, added_texts
from resolvent.data.encoding import Encoder
from resolvent.data.stream import encode_prompt
from resolvent.errors import CheckpointError, DataError, ResolventError
from resolvent.evaluation.influence import input_gradients
from resolvent.files import read_lines
from resolvent.inspection.trace import LayerTrace, MemoryTrace, trace_text
from resolvent.models import IntegratedModel
from resolvent.models.phase2 import Phase2Block, Phase2Config
from resolvent.models.phases import phase_of
from resolvent.ops.consolidation import signal_to_noise
from resolvent.ops.precision import at_least_float32

SNR_EDGES = np.geomspace(1e-3, 32, 46)
"""Edges of the bins of the SNR; values beyond them count in the outermost bins."""

_MOST_POINTS = 1000
"""Most points of a learning curve; a longer run is averaged over intervals of steps."""

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
class Layer:
    """A layer at every token.

    Attributes:
        real, imaginary: parts of the resolvent's g, (H, N).
        resolvent_bound: upper bound of ``|g|``, (H, N).
        gamma: decay rates, (H, N); None without dissipation.
        memory: None without a memory.
        distance: number of tokens that each head looks back on average, (H, N); None without attention.
    """

    real: list[Row]
    imaginary: list[Row]
    resolvent_bound: list[Row]
    gamma: list[Row] | None
    memory: Memory | None
    distance: list[Row] | None


@dataclass(frozen=True, repr=False)
class Inspection:
    """Inspection of a model on a text.

    Attributes:
        name: name of the model.
        version: version of this package.
        facts: properties of the model, by name.
        curves: None without metrics.
        tokens: text of the tokens, (N,); empty for a part of a character that a later token completes.
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
    curves: Curves | None
    tokens: list[str]
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
        return f"Inspection({self.name!r}, {len(self.tokens):,} tokens, {len(self.layers)} layers)"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return dataclasses.asdict(self)


def inspect_model(
    model: IntegratedModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int = 500,
    name: str = "model",
    metrics: Path | None = None,
) -> Inspection:
    """Read a text and record the computations inside a model.

    Args:
        model: the model; it keeps its mode, dropout is off, and its parameters get no gradients.
        tokenizer: its tokenizer.
        text: the text, which is read from its beginning.
        length: most tokens to read, including the one that opens a text.
        name: name of the model.
        metrics: metrics.jsonl of a run, for the learning curves.

    Raises:
        CheckpointError: the metrics are damaged.
        DataError: there is no text.
        ResolventError: a value of the model is not finite.
    """
    ids = torch.from_numpy(encode_prompt(text, Encoder(tokenizer))[:length])
    if len(ids) < 2:
        raise DataError("there is no text to inspect: it is empty, or the length leaves no token of it")
    ids = ids.to(next(model.parameters()).device)
    seen = trace_text(model, ids)
    nats, expected = _predictions(model, tokenizer, seen.hidden, ids)
    rules = [block.consolidation() for block in model.blocks if isinstance(block, Phase2Block)]
    consolidation = next((rule for rule in rules if rule is not None), None)
    return Inspection(
        name=name,
        version=__version__,
        facts=_facts(model),
        curves=read_curves(metrics) if metrics is not None else None,
        tokens=token_texts(tokenizer, ids.tolist()),
        nats=nats,
        expected=expected,
        influence=_influence(model, ids),
        places=seen.places,
        layers=[_layer(layer, block) for layer, block in zip(seen.layers, model.blocks, strict=True)],
        snr_edges=[_short(edge) for edge in SNR_EDGES],
        snr_threshold=consolidation.snr.threshold if consolidation and consolidation.snr else None,
        resonance_threshold=consolidation.resonance.threshold if consolidation and consolidation.resonance else None,
        consolidation_interval=consolidation.interval if consolidation else None,
        dt=model.config.hebbian_dt if isinstance(model.config, Phase2Config) else 1.0,
    )


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds."""
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in ids]


def read_curves(path: Path) -> Curves:
    """Return the learning curves of a run.

    Raises:
        CheckpointError: the file cannot be read, or holds a line that is no record.
    """
    try:
        # A run in progress may have written a part of the last line.
        records: list[dict[str, float]] = [json.loads(line) for line in read_lines(path) if line.endswith(b"\n")]
        if not all(isinstance(record, dict) for record in records):
            raise TypeError("a line that is no record")
        steps = [record for record in records if "loss" in record]
        checks = [record for record in records if "validation_loss" in record]
        return Curves(
            *(_thinned(_column(steps, key)) for key in ("step", "bits_per_byte", "grad_norm", "lr")),
            *(_column(checks, key).tolist() for key in ("step", "validation_bits_per_byte")),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot read the learning curves in {path}: {error!r}; move it away") from error


def _column(records: list[dict[str, float]], key: str) -> np.ndarray:
    values = np.asarray([record[key] for record in records], float)
    if not np.isfinite(values).all():
        raise ValueError(f"{key} is not finite")
    return values


def _thinned(values: np.ndarray) -> Row:
    """Return means over intervals of about equal length."""
    stretches = np.array_split(values, min(len(values), _MOST_POINTS) or 1)
    return [_short(stretch.mean()) for stretch in stretches if len(stretch)]


def _facts(model: IntegratedModel) -> dict[str, str]:
    config = model.config
    return {
        "Phase": str(phase_of(model)),
        "Parameters": f"{model.num_parameters():,}",
        "Layers": str(model.n_layers),
        "Heads": str(config.num_heads),
        "Width": str(model.d_model),
        "Vocabulary": f"{model.vocab_size:,} tokens",
        "Trained on": f"windows of {model.n_seq:,} tokens",
    }


def _predictions(
    model: IntegratedModel, tokenizer: Tokenizer, hidden: Tensor, ids: Tensor
) -> tuple[Row, list[list[tuple[str, float]]]]:
    with torch.no_grad():
        log_p = at_least_float32(model.lm_head(hidden[:-1])).log_softmax(dim=-1)
    nats = -log_p.gather(1, ids[1:, None]).squeeze(1)
    best = log_p.topk(min(3, model.vocab_size))
    rows = zip(ids.tolist(), best.indices.tolist(), strict=False)  # no prediction after the last token is shown
    words = [added_texts(tokenizer, before, row) for before, row in rows]
    chances = _numbers(best.values.exp())
    return _numbers(nats), [list(zip(*pair, strict=True)) for pair in zip(words, chances, strict=True)]


def _influence(model: IntegratedModel, ids: Tensor) -> Row:
    pieces = list(input_gradients(model, ids[None], piece_tokens=len(ids)))
    return _numbers(torch.cat([piece[0] for piece in reversed(pieces)]).norm(dim=-1))


def _layer(seen: LayerTrace, block: torch.nn.Module) -> Layer:
    return Layer(
        real=_numbers(seen.resolvent.real.T),
        imaginary=_numbers(seen.resolvent.imag.T),
        resolvent_bound=_numbers(seen.resolvent_bound.T),
        gamma=None if seen.gamma is None else _numbers(seen.gamma.T),
        memory=_memory(seen.memory, block) if seen.memory is not None and isinstance(block, Phase2Block) else None,
        distance=None if seen.distance is None else _numbers(seen.distance.T),
    )


def _memory(seen: MemoryTrace, block: Phase2Block) -> Memory:
    assert block.hebbian is not None  # a layer without memory has no trace of one
    snr = signal_to_noise(seen.last, paired=block.hebbian.rotation_proj is not None).flatten(1)
    bins = [np.histogram(row.clip(SNR_EDGES[0], SNR_EDGES[-1]), SNR_EDGES)[0] / row.size for row in snr.cpu().numpy()]
    signal = strength = modes = None
    if (snr_filter := block.snr_filter) is not None:
        found = snr_filter.statistics(seen.last[None])
        signal, strength = _numbers(1 - found["low_snr_ratio"][0]), _numbers(found["strength"][0].detach())
    if block.resonance is not None:
        found = block.resonance.statistics(seen.last[None])
        modes = Modes(_numbers(found["diag_energy"][0]), _numbers(found["gate"][0].detach()))
    return Memory(
        energy=_numbers(seen.energy.T),
        bound=_numbers(seen.bound.T),
        snr=[[_short(share) for share in row] for row in bins],
        signal=signal,
        strength=strength,
        modes=modes,
    )


def _numbers(values: Tensor) -> Any:
    """Return rounded numbers, in nested lists of the tensor's shape.

    Raises:
        ResolventError: a number is not finite.
    """
    if not values.isfinite().all():
        raise ResolventError("the model computes numbers that are not finite: its weights are damaged or diverged")
    return [_numbers(row) for row in values] if values.dim() > 1 else [_short(x) for x in values.tolist()]


def _short(x: float) -> float:
    return float(f"{x:.4g}")
