"""Attention layers of the comparison: ours among the mixers of a peer, and ours without L2-normalised q and k.

Shapes: B batch, N sequence, D model width, H heads, K head width, C channels of q, k and v.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.quality.mixers import FLOAT_BYTES, Mixer
from resolvent.layers import LocalAttentionLayer
from resolvent.layers.heads import Heads
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.models.phase2.block import attention_layer, blocks_of
from resolvent.ops.short_conv import causal_conv, next_tail


class WindowedAttention(Mixer):
    """The attention layer of our hybrids as a mixer of a peer.

    Args:
        width: D.
        heads: H; K = D / H.
        window: number of tokens that a token attends to; None for all.
    """

    def __init__(self, width: int, heads: int, window: int | None) -> None:
        super().__init__()
        self.layer = LocalAttentionLayer(width, heads, width // heads, window)

    def reset(self, generator: torch.Generator) -> None:
        self.layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.out_proj(self.layer(x).gated)

    def state_bytes(self, length: int) -> int:
        taps, channels = self.layer.conv_shape
        slots = min(length, self.layer.window or length)
        return FLOAT_BYTES * (taps * channels + 2 * slots * self.layer.out_proj.in_features)


class PlainScoresLayer(LocalAttentionLayer):
    """Attention with convolution and SiLU, but with q and k as they are and scores that are divided by sqrt(K)."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        if self.conv_weight is None:
            raise ValueError("attention without convolution and without L2-normalised q and k: take transformer")
        self.log_temperature = None

    def _convolved(
        self, projected: Tensor, taps: Tensor, conv_tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Heads, Tensor]:
        own, rest = projected.tensor_split([self.channels], dim=-1)
        if conv_tail is None:
            conv_tail = self._fresh_tail(own, cu_seqlens)
        mixed = F.silu(causal_conv(own, taps.to(own.dtype), conv_tail, cu_seqlens))
        q, k, v = mixed.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return Heads(q, k, v, next_tail(own, conv_tail, cu_seqlens)), rest


def with_plain_scores(model: Phase2IntegratedModel) -> None:
    """Put a ``PlainScoresLayer`` in the place of the attention of every block."""
    config: Phase2Config = model.config
    for layer, block in enumerate(blocks_of(model)):
        if block.attention is None:
            raise ValueError(f"block {layer} has a memory, whose bound needs L2-normalised keys: no-qk-norm is refused")
        block.attention = attention_layer(config, layer, PlainScoresLayer)
