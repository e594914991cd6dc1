"""Diagnostics of Phase 2: decay rates, SNR, resonance, and the energy of the memories beside its bound.

Shapes: B batch, N sequence, D model width, H heads, K = V head width, S sequences.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ...layers import LyapunovStabilityMonitor, MemoryResonanceLayer, SNRMemoryFilter
from ...ops import MemoryState
from ..trace import Trace
from .block import Phase2Block, Phase2Record
from .state import Phase2State


class Phase2Diagnostics(TypedDict):
    """Diagnostics that ``forward(..., return_diagnostics=True)`` returns: lists have an entry per layer.

    Attributes:
        input_embeddings: scaled and with positions, (B, N, D).
        final_hidden_states: behind the final norm, (B, N, D).
        layer_outputs: residual stream behind the layer, (B, N, D).
        gamma_values: decay rates Γ, (B, N, H); None without BK-Core.
        snr_stats: SNR of the memory after the last token, and the ``strength`` of the SNR filter, each (S, H); see
            ``SNRMemoryFilter.statistics``. Empty without the filter, and where the layer attends.
        resonance_info: modes of that memory; see ``MemoryResonanceLayer.statistics``. Empty without resonance.
        stability_metrics: energy of that memory, its rate of change and its bound, each (S, H); see
            ``LyapunovStabilityMonitor.metrics``. Empty where the layer attends.
    """

    input_embeddings: Tensor
    final_hidden_states: Tensor
    layer_outputs: list[Tensor]
    gamma_values: list[Tensor | None]
    snr_stats: list[dict[str, Tensor]]
    resonance_info: list[dict[str, Tensor]]
    stability_metrics: list[dict[str, Tensor]]


@torch.no_grad()
def diagnose(blocks: Sequence[Phase2Block], trace: Trace[Phase2Record, Phase2State]) -> Phase2Diagnostics:
    """Return the diagnostics of a trace, in the shape of the input and without gradients."""
    memories = [record.state.facing_memory() for record in trace.layers]
    return {
        "input_embeddings": trace.restore(trace.embedded.detach()),
        "final_hidden_states": trace.restore(trace.normed.detach()),
        "layer_outputs": [trace.restore(record.output.detach()) for record in trace.layers],
        "gamma_values": [None if r.gamma is None else trace.restore(r.gamma.detach()) for r in trace.layers],
        "snr_stats": [_statistics(block.snr_filter, S) for block, S in zip(blocks, memories, strict=True)],
        "resonance_info": [_statistics(block.resonance, S) for block, S in zip(blocks, memories, strict=True)],
        "stability_metrics": [_stability(block, trace, layer) for layer, block in enumerate(blocks)],
    }


def _statistics(part: SNRMemoryFilter | MemoryResonanceLayer | None, memory: Tensor | None) -> dict[str, Tensor]:
    """Return a filter's statistics of a layer's memory; none where there is no filter or no memory."""
    return {} if part is None or memory is None else part.statistics(memory)


def _stability(block: Phase2Block, trace: Trace[Phase2Record, Phase2State], layer: int) -> dict[str, Tensor]:
    """Return the stability metrics of a layer, per sequence and head; none where the layer attends."""
    hebbian, record, lengths = block.hebbian, trace.layers[layer], trace.batch.lengths
    after = record.state.memory
    if hebbian is None or after is None or record.gamma is None:
        return {}
    before = None if trace.before is None else trace.before.layers[layer].memory
    before = before or MemoryState(*map(torch.zeros_like, after))
    writes = record.values.norm(dim=-1, dtype=hebbian.eta.dtype) * hebbian.eta
    return LyapunovStabilityMonitor.metrics(
        before,
        after,
        _per_sequence(writes, lengths, "amax", 0.0),
        _per_sequence(record.gamma * hebbian.dt, lengths, "amin", torch.inf),
        (lengths * hebbian.dt).to(after.memory.device),
        block.amplification,
    )


def _per_sequence(x: Tensor, lengths: Tensor, reduce: str, empty: float) -> Tensor:
    """Return an extreme over the tokens of each sequence: (B, N, H) -> (S, H)."""
    heads = x.shape[-1]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(x.device)
    out = x.new_full((len(lengths), heads), empty)
    return out.scatter_reduce(0, sequence[:, None].expand(-1, heads), x.reshape(-1, heads), reduce)
