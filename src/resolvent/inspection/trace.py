"""Trace of a text: resolvent, Γ and memory of every layer, token by token.

Shapes: N tokens, P positions after which the memory is recorded, D model width, H heads, K = V head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resolvent.errors import ConfigError
from resolvent.inspection.attention import largest_weights
from resolvent.layers import LyapunovStabilityMonitor, StaticBKLayer
from resolvent.models import IntegratedModel, observe
from resolvent.models.inference import inference_view
from resolvent.models.phase1 import Phase1Record
from resolvent.models.phase2 import Phase2Block, Phase2Record


@dataclass(frozen=True)
class MemoryTrace:
    """Trace of a layer's memory.

    Attributes:
        energy: ``||S||²`` after the tokens at ``TextTrace.places``, (P, H).
        bound: upper bound of the energy, given the tokens so far, (P, H).
        last: S after the last token, in the frame that turns with the tokens, (H, K, V).
    """

    energy: Tensor
    bound: Tensor
    last: Tensor


@dataclass(frozen=True)
class AttentionTrace:
    """Trace of a layer's attention.

    Attributes:
        distance: number of tokens that each head looks back on average, at every token, (N, H).
        weights: largest weights of every token, largest first, (H, N, T).
        places: indices of the tokens that they belong to, (H, N, T).
    """

    distance: Tensor
    weights: Tensor
    places: Tensor


@dataclass(frozen=True)
class LayerTrace:
    """Trace of a layer.

    Attributes:
        resolvent: g of every token, complex (N, H).
        resolvent_bound: upper bound of ``|g|``, ``1 / (κΓ + ζ)``, (N, H).
        gamma: Γ of every token, (N, H); None without dissipation.
        memory: None without a memory.
        attention: None where the layer does not attend.
    """

    resolvent: Tensor
    resolvent_bound: Tensor
    gamma: Tensor | None
    memory: MemoryTrace | None
    attention: AttentionTrace | None = None


@dataclass(frozen=True, repr=False)
class TextTrace:
    """Trace of a text.

    Attributes:
        hidden: final hidden states, (N, D).
        places: indices of the tokens after which the memories are recorded, (P,).
        layers: a trace per layer.
    """

    hidden: Tensor
    places: list[int]
    layers: list[LayerTrace]

    def __repr__(self) -> str:
        return f"TextTrace({len(self.hidden):,} tokens, {len(self.layers)} layers)"


def trace_text(model: IntegratedModel, tokens: Tensor, *, stride: int = 4) -> TextTrace:
    """Read a text in pieces, which does not change the results, and record the memories after each piece.

    Args:
        model: the model; it keeps its mode, and dropout is off.
        tokens: int64 (N,).
        stride: tokens between two records of the memories.
    """
    pieces = tokens[None].split(stride, dim=1)
    traces, state = [], None
    model = inference_view(model)
    with torch.no_grad():
        for piece in pieces:
            traces.append(observe(model, piece, state=state))
            state = traces[-1].after
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0) - 1
    records = zip(*(trace.layers for trace in traces), strict=True)
    layers = [_layer(block, pieces, ends) for block, pieces in zip(model.blocks, records, strict=True)]
    return TextTrace(torch.cat([trace.hidden[0] for trace in traces]), ends.tolist(), layers)


def _layer(block: nn.Module, records: Sequence[Phase1Record | Phase2Record], ends: Tensor) -> LayerTrace:
    """Return the trace of a layer from its records of all pieces, whose last tokens are ``ends`` (P,)."""
    features = [record.features[0] for record in records if record.features is not None]
    if not features:
        raise ConfigError("there is no BK-Core to inspect in a model with bk_core=False: convert it with bk_core=True")
    g = torch.complex(*torch.cat(features).chunk(2, dim=-1))
    dissipative = [record for record in records if isinstance(record, Phase2Record)]
    if not dissipative:
        return LayerTrace(g, torch.full_like(g.real, 1 / StaticBKLayer.ZETA), None, None)
    assert isinstance(block, Phase2Block)
    gamma = torch.cat([record.gamma[0] for record in dissipative if record.gamma is not None])
    bk = block.dissipative_bk
    assert bk is not None
    bound = 1 / (bk.kappa.detach().abs() * gamma + bk.log_zeta.detach().exp())
    return LayerTrace(g, bound, gamma, _memory(block, dissipative, gamma, ends), _attention(block, dissipative))


def _attention(block: Phase2Block, records: Sequence[Phase2Record]) -> AttentionTrace | None:
    """Return the trace of the attention of a layer; None where the layer does not attend."""
    if block.attention is None:
        return None
    x = torch.cat([record.memory_input for record in records], dim=1)
    with torch.no_grad():
        distance = block.attention.distances(x)[0]
    return AttentionTrace(distance, *largest_weights(block.attention, x[0]))


def _memory(block: Phase2Block, records: Sequence[Phase2Record], gamma: Tensor, ends: Tensor) -> MemoryTrace | None:
    """Return the trace of a layer's memory, given its Γ (N, H); None where the layer attends."""
    hebbian = block.hebbian
    if hebbian is None:
        return None
    values = torch.cat([record.values[0] for record in records])
    memories = torch.cat([S for record in records if (S := record.state.facing_memory()) is not None])
    bound = LyapunovStabilityMonitor.bound(
        torch.zeros_like(gamma),
        (values.norm(dim=-1) * hebbian.eta.detach()).cummax(dim=0).values,
        (gamma * hebbian.dt).cummin(dim=0).values,
        block.amplification,
    )
    energy = memories.square().sum(dim=(-2, -1))
    return MemoryTrace(energy, bound[ends.to(bound.device)], memories[-1])
