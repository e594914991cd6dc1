"""The Phase 1 block: BK-Core of a static Hamiltonian, AR-SSM and feed-forward network, each in a residual branch.

Shapes: B batch, N sequence, D model width, H heads, S sequences.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import AdaptiveRankSemiseparableLayer, LowRankLinear, StaticBKLayer
from ..base import Block
from .config import Phase1Config
from .state import Phase1LayerState


class Phase1Block(Block):
    """One block."""

    def __init__(self, config: Phase1Config):
        super().__init__()
        width, heads = config.d_model, config.num_heads
        self.ln1 = nn.LayerNorm(width)
        self.bk = StaticBKLayer(width, heads, config.backend)
        self.bk_proj = nn.Linear(2 * heads, width, bias=False)
        self.ln2 = nn.LayerNorm(width) if config.ar_ssm_enabled else None
        self.ar_ssm = (
            AdaptiveRankSemiseparableLayer(
                width,
                config.ar_ssm_max_rank,
                config.gate_width,
                config.ar_ssm_bounded,
                backend=config.backend if config.ar_ssm_use_fused_scan else "torch",
            )
            if config.ar_ssm_enabled
            else None
        )
        self.ln3 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            _linear(config, width, config.ffn_width), nn.GELU(), _linear(config, config.ffn_width, width)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.checkpointed = config.use_gradient_checkpointing
        self.ar_ssm_checkpointed = config.use_gradient_checkpointing and config.checkpoint_ar_ssm

    def state_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one sequence's state, tensor by tensor."""
        return [(self.bk.num_heads,), *(self.ar_ssm.state_shape if self.ar_ssm is not None else ())]

    def compute(
        self, x: Tensor, state: Phase1LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Phase1LayerState]:
        """x (B, N, D), the block's state and the offsets of packed sequences -> x, the resolvent's features
        (B, N, 2H), the gates (B, N, rank) where there are any, and the next state."""
        resolvent, ar_ssm_state = state if state is not None else (None, None)
        x, features, resolvent = _recomputed(self.checkpointed, self._scatter, x, resolvent, cu_seqlens)
        gates = None
        if self.ar_ssm is not None:
            x, gates, ar_ssm_state = _recomputed(self.ar_ssm_checkpointed, self._sum, x, ar_ssm_state, cu_seqlens)
        x = _recomputed(self.checkpointed, self._feed_forward, x)
        return x, features, gates, Phase1LayerState(resolvent, ar_ssm_state)

    def _scatter(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        features, state = self.bk(self.ln1(x), state, cu_seqlens)
        return x + self.dropout(self.bk_proj(features.to(x.dtype))), features, state

    def _sum(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        assert self.ar_ssm is not None and self.ln2 is not None
        output, gates, state = self.ar_ssm(self.ln2(x), state, cu_seqlens)
        return x + self.dropout(output), gates, state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.ln3(x)))


def _linear(config: Phase1Config, in_features: int, out_features: int) -> nn.Module:
    rank = config.effective_ffn_rank
    return nn.Linear(in_features, out_features) if rank is None else LowRankLinear(in_features, out_features, rank)


def _recomputed(enabled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; if enabled and there is a gradient to come, its intermediate values are not kept but
    computed anew in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
