"""Diagnostics of Phase 1: gates, ranks, and how near the resolvents came to a pole.

Shapes: B batch, N sequence, D model width, H heads, R rank.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn

from ...layers import TensorTrainEmbedding
from ..trace import Trace
from .block import Phase1Record
from .config import Phase1Config
from .state import Phase1State


class Phase1Diagnostics(TypedDict):
    """Diagnostics that ``forward(..., return_diagnostics=True)`` returns: lists have an entry per layer.

    Attributes:
        input_embeddings: scaled and with positions, (B, N, D).
        final_hidden_states: behind the final norm, (B, N, D).
        layer_outputs: residual stream behind the layer, (B, N, D).
        gate_values: gates of the semiseparable layer, (B, N, R).
        effective_rank: sum of a token's gates, mean over the tokens, ().
        gate_sparsity: share of the gates below one half, ().
        htt_compression_ratio: parameters of the token embedding over those of a table.
        stability_metrics: the least pivot ``min 1 / |g|`` of ``H - z``, and mean (``s1``) and root mean square (``s2``)
            of ``|g|``, each (); no entries where monitoring is off.
        stability_warnings: one sentence per metric that is beyond its configured bound.
    """

    input_embeddings: Tensor
    final_hidden_states: Tensor
    layer_outputs: list[Tensor]
    gate_values: list[Tensor]
    effective_rank: list[Tensor]
    gate_sparsity: list[Tensor]
    htt_compression_ratio: float
    stability_metrics: list[dict[str, Tensor]]
    stability_warnings: list[str]


@torch.no_grad()
def diagnose(
    config: Phase1Config, token_embedding: nn.Module, trace: Trace[Phase1Record, Phase1State]
) -> Phase1Diagnostics:
    """Return the diagnostics of a trace, in the shape of the input and without gradients."""
    gates = [record.gates.detach() for record in trace.layers if record.gates is not None]
    monitored = trace.layers if config.stability_monitoring_enabled else ()
    metrics = [_stability(record.features) for record in monitored]
    return {
        "input_embeddings": trace.restore(trace.embedded.detach()),
        "final_hidden_states": trace.restore(trace.normed.detach()),
        "layer_outputs": [trace.restore(record.output.detach()) for record in trace.layers],
        "gate_values": [trace.restore(g) for g in gates],
        "effective_rank": [g.sum(-1).mean() for g in gates],
        "gate_sparsity": [(g < 0.5).float().mean() for g in gates],
        "htt_compression_ratio": (
            token_embedding.compression_ratio if isinstance(token_embedding, TensorTrainEmbedding) else 1.0
        ),
        "stability_metrics": metrics,
        "stability_warnings": [w for i, m in enumerate(metrics) for w in _warnings(config, i, m)],
    }


def _stability(features: Tensor) -> dict[str, Tensor]:
    """Return the stability metrics of the features [Re g, Im g] (B, N, 2H)."""
    size = torch.complex(*features.detach().float().chunk(2, dim=-1)).abs()
    return {"least_pivot": 1 / size.max(), "s1": size.mean(), "s2": size.square().mean().sqrt()}


def _warnings(config: Phase1Config, layer: int, metrics: dict[str, Tensor]) -> list[str]:
    """Return a sentence for every metric beyond the configured bounds; non-finite values are beyond them."""
    pivot, s1, s2 = (metrics[name].item() for name in ("least_pivot", "s1", "s2"))
    checks = (
        (pivot > config.stability_threshold, f"least pivot {pivot:g}, threshold {config.stability_threshold:g}"),
        (s1 < config.schatten_s1_bound, f"s1 {s1:g}, bound {config.schatten_s1_bound:g}"),
        (s2 < config.schatten_s2_bound, f"s2 {s2:g}, bound {config.schatten_s2_bound:g}"),
    )
    return [f"layer {layer}: {text}" for within, text in checks if not within]
