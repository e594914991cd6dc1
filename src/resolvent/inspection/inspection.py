"""Contents of the inspection page, as plain values.

Shapes: N tokens of the text, P positions at which the memories are recorded, H heads, K modes of a memory.
"""

import dataclasses
import json
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
from resolvent.inspection.findings import find
from resolvent.inspection.trace import AttentionTrace, LayerTrace, MemoryTrace, trace_text
from resolvent.inspection.values import Attention, Curves, Inspection, Layer, Memory, Modes, Row
from resolvent.inspection.words import word_numbers
from resolvent.models import IntegratedModel
from resolvent.models.phase2 import Phase2Block, Phase2Config
from resolvent.models.phases import phase_of
from resolvent.ops.consolidation import signal_to_noise
from resolvent.ops.precision import at_least_float32
from resolvent.wording import counted

SNR_EDGES = np.geomspace(1e-3, 32, 46)
"""Edges of the bins of the SNR; values beyond them count in the outermost bins."""

_MOST_POINTS = 1000
"""Most points of a learning curve; a longer run is averaged over intervals of steps."""

_GUESSES = 5
"""Number of the likeliest tokens that are kept at every position."""


def inspect_model(
    model: IntegratedModel,
    tokenizer: Tokenizer,
    text: str | np.ndarray,
    *,
    length: int = 500,
    name: str = "model",
    metrics: Path | None = None,
) -> Inspection:
    """Read a text and record the computations inside a model.

    Args:
        model: the model; it keeps its mode, dropout is off, and its parameters get no gradients.
        tokenizer: its tokenizer.
        text: the text, which is read from its beginning; or its tokens, with the one that opens it.
        length: most tokens to read, including the one that opens a text.
        name: name of the model.
        metrics: metrics.jsonl of a run, for the learning curves.

    Raises:
        CheckpointError: the metrics are damaged.
        DataError: there is no text.
        ResolventError: a value of the model is not finite.
    """
    tokens = encode_prompt(text, Encoder(tokenizer)) if isinstance(text, str) else text
    ids = torch.from_numpy(tokens[:length])
    if len(ids) < 2:
        raise DataError("there is no text to inspect: it is empty, or the length leaves no token of it")
    ids = ids.to(next(model.parameters()).device)
    seen = trace_text(model, ids)
    nats, expected = _predictions(model, tokenizer, seen.hidden, ids)
    rules = [block.consolidation() for block in model.blocks if isinstance(block, Phase2Block)]
    consolidation = next((rule for rule in rules if rule is not None), None)
    words = token_texts(tokenizer, ids.tolist())
    inspection = Inspection(
        name=name,
        version=__version__,
        facts=_facts(model),
        findings=[],
        curves=read_curves(metrics) if metrics is not None else None,
        tokens=words,
        words=word_numbers(words),
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
    return dataclasses.replace(inspection, findings=find(inspection))


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
        "Vocabulary": f"{counted(model.vocab_size, 'token')}",
        "Trained on": f"windows of {counted(model.n_seq, 'token')}",
    }


def _predictions(
    model: IntegratedModel, tokenizer: Tokenizer, hidden: Tensor, ids: Tensor
) -> tuple[Row, list[list[tuple[str, float]]]]:
    with torch.no_grad():
        log_p = at_least_float32(model.lm_head(hidden[:-1])).log_softmax(dim=-1)
    nats = -log_p.gather(1, ids[1:, None]).squeeze(1)
    best = log_p.topk(min(_GUESSES, model.vocab_size))
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
        attention=None if seen.attention is None else _attention(seen.attention),
    )


def _attention(seen: AttentionTrace) -> Attention:
    return Attention(_numbers(seen.distance.T), seen.places.tolist(), _numbers(seen.weights))


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
