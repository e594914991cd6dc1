"""Adaptive-rank semiseparable layer (AR-SSM): a gated sum over all past tokens, and a short convolution.

Shapes: B batch, N sequence, D model width, R rank, S packed sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import gated_prefix_sum
from ..ops.packed import count_sequences
from ..ops.precision import for_products, wide_dtype
from ..ops.short_conv import causal_conv, next_tail

CONV_SIZE = 3
"""Tokens that the layer's convolution spans."""


class SemiseparableState(NamedTuple):
    """State of the layer.

    Attributes:
        total: c of the last token, float64 (B, R).
        conv_tail: conv state: the last inputs of the convolution, float32 (B, 2, D).
    """

    total: Tensor
    conv_tail: Tensor


class AdaptiveRankSemiseparableLayer(nn.Module):
    """AR-SSM: ``y_t = W_o (c_t g_t V x_t) + conv(x)_t``, ``c_t = sum_{s <= t} g_s U x_s``, ``g = sigmoid(gate(x))``.

    The sum grows with the length: in long texts it leaves the range of the short texts of training. So the layer reads
    ``c / sqrt(1 + c²)`` instead of c, channel by channel; the sum itself, and its state, stay exact.

    The layer computes with its first ``rank`` channels only: the weights are sliced, so a low rank saves work. The
    output weights start at zero: a channel that was never in use adds nothing, and raising the rank changes no output
    until training has used the new channels.

    Args:
        d_model: width D.
        max_rank: channels R.
        gate_hidden_dim: hidden width of the gate.
        bounded: read the sum through that bound; False for the plain formula, which fails on texts longer than those
            of training (docs/conversion.md has figures).
        backend: ``auto``, ``torch`` or ``triton``.
    """

    def __init__(self, d_model: int, max_rank: int, gate_hidden_dim: int, bounded: bool = True, backend: str = "auto"):
        super().__init__()
        self.d_model, self.max_rank, self.bounded, self.backend = d_model, max_rank, bounded, backend
        self.rank = max_rank
        self.gate_hidden = nn.Linear(d_model, gate_hidden_dim)
        self.gate_proj = nn.Linear(gate_hidden_dim, max_rank)
        self.u_proj = nn.Linear(d_model, max_rank, bias=False)
        self.v_proj = nn.Linear(d_model, max_rank, bias=False)
        self.out_proj = nn.Linear(max_rank, d_model, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(CONV_SIZE, d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters with a fixed start: an output of zero."""
        self.out_proj.weight.zero_()
        self.conv_weight.zero_()

    def set_rank(self, rank: int) -> None:
        """Compute with the first ``rank`` channels from now on.

        Raises:
            ValueError: the layer has fewer channels, or ``rank`` is below 1.
        """
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"rank must be between 1 and the layer's {self.max_rank}, got {rank}")
        self.rank = rank

    @property
    def state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one sequence's total (R,) and convolution tail (2, D)."""
        return (self.max_rank,), (CONV_SIZE - 1, self.d_model)

    def extra_repr(self) -> str:
        return f"rank={self.rank} of {self.max_rank}"

    def forward(
        self, x: Tensor, state: SemiseparableState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, SemiseparableState]:
        """Mix the tokens.

        Args:
            x: tokens, (B, N, D).
            state: state before the first token, one row per sequence.
            cu_seqlens: offsets of S packed sequences.

        Returns:
            output for the residual stream (B, N, D), gates (B, N, rank) and the next state.
        """
        x = for_products(x)
        state = state if state is not None else self._empty_state(x, cu_seqlens)
        rank = self.rank
        hidden = F.relu(self.gate_hidden(x))
        gates = torch.sigmoid(_first_channels(self.gate_proj, hidden, rank))
        u, v = _first_channels(self.u_proj, x, rank), _first_channels(self.v_proj, x, rank)
        sums, total = gated_prefix_sum(
            gates, u, initial_state=state.total[:, :rank], cu_seqlens=cu_seqlens, backend=self.backend
        )
        if self.bounded:
            sums = sums * torch.rsqrt(1 + sums.square())
        read = (sums * (gates * v)).to(x.dtype)
        far = self.out_proj(read) if rank == self.max_rank else F.linear(read, self.out_proj.weight[:, :rank])
        near = causal_conv(x, self.conv_weight.to(x.dtype), state.conv_tail, cu_seqlens)
        if rank < self.max_rank:
            total = torch.cat([total, state.total[:, rank:]], dim=1)
        return far + near, gates, SemiseparableState(total, next_tail(x, state.conv_tail, cu_seqlens))

    def _empty_state(self, x: Tensor, cu_seqlens: Tensor | None) -> SemiseparableState:
        sequences = count_sequences(x.shape[0], cu_seqlens)
        total, tail = self.state_shape
        return SemiseparableState(
            torch.zeros(sequences, *total, dtype=torch.float64, device=x.device),
            torch.zeros(sequences, *tail, dtype=wide_dtype(x), device=x.device),
        )


def _first_channels(projection: nn.Linear, x: Tensor, rank: int) -> Tensor:
    """Return the first ``rank`` outputs of a projection; all of them come from a call of the module, wrapped or not."""
    if rank == projection.out_features:
        return projection(x)
    return F.linear(x, projection.weight[:rank], None if projection.bias is None else projection.bias[:rank])
