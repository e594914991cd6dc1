"""The Phase 1 block: BK-Core of a static Hamiltonian, AR-SSM and feed-forward network, each in a residual branch.

Shapes: B batch, N sequence, D model width, H heads, R rank, S sequences.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import AdaptiveRankSemiseparableLayer, LowRankLinear, SemiseparableState, StaticBKLayer
from ..base import Block
from .config import Phase1Config
from .state import Phase1LayerState

Inputs = TypeVarTuple("Inputs")
Output = TypeVar("Output")


class Phase1Record(NamedTuple):
    """Record of what a Phase 1 block computed.

    Attributes:
        output: residual stream behind the block, (B, N, D).
        features: features [Re g, Im g] of the resolvent, (B, N, 2H).
        gates: gates of the semiseparable layer, (B, N, R); None without one.
        state: state after the last token.
    """

    output: Tensor
    features: Tensor
    gates: Tensor | None
    state: Phase1LayerState


class Phase1Block(Block[Phase1Record]):
    """BK-Core, AR-SSM and feed-forward network, each behind a norm and in a residual branch."""

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
        return [(self.bk.num_heads,), *(self.ar_ssm.state_shape if self.ar_ssm is not None else ())]

    def compute(self, x: Tensor, state: Phase1LayerState | None, cu_seqlens: Tensor | None) -> Phase1Record:
        """Run the block.

        Args:
            x: residual stream, (B, N, D).
            state: the block's state before the first token; None for a fresh start.
            cu_seqlens: offsets of packed sequences.
        """
        resolvent, ar_ssm_state = state if state is not None else (None, None)
        x, features, resolvent = checkpointed(self.checkpointed, self._scatter, x, resolvent, cu_seqlens)
        gates = None
        if self.ar_ssm is not None:
            x, gates, ar_ssm_state = checkpointed(self.ar_ssm_checkpointed, self._sum, x, ar_ssm_state, cu_seqlens)
        x = checkpointed(self.checkpointed, self._feed_forward, x)
        return Phase1Record(x, features, gates, Phase1LayerState(resolvent, ar_ssm_state))

    def _scatter(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        features, state = self.bk(self.ln1(x), state, cu_seqlens)
        return x + self.dropout(self.bk_proj(features.to(x.dtype))), features, state

    def _sum(
        self, x: Tensor, state: SemiseparableState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, SemiseparableState]:
        assert self.ar_ssm is not None and self.ln2 is not None
        output, gates, state = self.ar_ssm(self.ln2(x), state, cu_seqlens)
        return x + self.dropout(output), gates, state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.ln3(x)))


def _linear(config: Phase1Config, in_features: int, out_features: int) -> nn.Module:
    rank = config.effective_ffn_rank
    return nn.Linear(in_features, out_features) if rank is None else LowRankLinear(in_features, out_features, rank)


def checkpointed(enabled: bool, function: Callable[[*Inputs], Output], *args: *Inputs) -> Output:
    """Return ``function(*args)``, with activation checkpointing if enabled.

    Where gradients are enabled, too, its activations are recomputed in the backward pass instead of kept.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
