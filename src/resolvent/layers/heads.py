"""Base of the layers that read queries, keys and values: projections and short convolution, norm, gate and output.

Shapes: B batch, N sequence, D model width, H heads of queries, J heads of keys and values, K = V head width, S packed
sequences, W convolution width, C = (H + 2J) K channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.normalize import unit_length, unit_rms
from ..ops.packed import count_sequences
from ..ops.precision import wide_dtype
from ..ops.queries_keys_values import queries_keys_values
from .linear import Projected, products


class Heads(NamedTuple):
    """Queries, keys and values of the tokens.

    Attributes:
        q: queries, (B, N, H, K), L2-normalised unless ``qk_norm`` is off.
        k: keys, (B, N, J, K), likewise.
        v: values, (B, N, J, V).
        conv_tail: conv state: the last inputs of the convolution, (B, W - 1, C) or (S, W - 1, C).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    conv_tail: Tensor


class HeadsLayer(nn.Module):
    """Parts that memory and attention share; a subclass computes the read-out of the heads.

    A short causal convolution mixes neighbouring tokens before q, k and v. Queries and keys are L2-normalised. The
    read-out of each head is RMS-normalised and multiplied by a gate of low rank.

    Args:
        d_model: width D.
        num_heads: heads H.
        head_dim: width of keys and values.
        conv_size: tokens W that the convolution spans; 1 for none.
        output_norm: RMS-normalise the read-out of each head.
        output_gate: gate the read-out with ``sigmoid`` of a projection of rank ``head_dim``.
        backend: ``auto``, ``torch`` or ``triton``.
        num_kv_heads: heads J of keys and values, of which H is a multiple; None for H. Fewer need ``conv_size`` 1.
        qk_norm: L2-normalise queries and keys; without it ``conv_size`` is 1.
        qkv_bias: add biases to q, k and v.
        norm_weight: RMS-normalise the read-out, whatever ``output_norm``, and multiply it by trained weights.

    Attributes:
        stacked: number of equal projections that lie on top of each other in one weight, which an optimizer of
            matrices takes apart.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        conv_size: int,
        output_norm: bool,
        output_gate: bool,
        backend: str,
        num_kv_heads: int | None = None,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        norm_weight: bool = False,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_kv_heads = num_kv_heads or num_heads
        self.output_norm, self.backend, self.qk_norm = output_norm or norm_weight, backend, qk_norm
        self.stacked = {"qkv_proj": num_heads // self.num_kv_heads + 2}
        width = num_heads * head_dim
        self.qkv_proj = nn.Linear(d_model, self.channels, bias=qkv_bias)
        self.out_proj = nn.Linear(width, d_model, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_size, self.channels)) if conv_size > 1 else None
        self.norm_weight = nn.Parameter(torch.empty(width)) if norm_weight else None
        self.gate_down = nn.Linear(d_model, head_dim, bias=False) if output_gate else None
        self.gate_up = nn.Linear(head_dim, width) if output_gate else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the convolution and the norm pass the token through."""
        if self.conv_weight is not None:
            self.conv_weight.zero_()[0] = 1.0
        if self.norm_weight is not None:
            self.norm_weight.fill_(1.0)

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear | None]:
        """The maps of the tokens: ``qkv_proj`` and, the narrow side of the gate, ``gate_down``."""
        return self.qkv_proj, self.gate_down

    def project(self, x: Tensor, projected: Projected | None) -> tuple[Tensor, Tensor | None]:
        """Return the products of x (B, N, D) with ``projections``: those that are known, if they are."""
        qkv, narrow = products(x, self.projections) if projected is None else projected
        assert qkv is not None
        return qkv, narrow

    @property
    def channels(self) -> int:
        """Width C of queries, keys and values side by side."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Shape of one sequence's conv state, (W - 1, C)."""
        taps = 1 if self.conv_weight is None else len(self.conv_weight)
        return taps - 1, self.channels

    def heads(self, projected: Tensor, conv_tail: Tensor | None, cu_seqlens: Tensor | None) -> Heads:
        """Compute queries, keys and values of projected tokens (B, N, C), behind a conv state; None for none yet."""
        if conv_tail is None:
            sequences = count_sequences(projected.shape[0], cu_seqlens)
            conv_tail = projected.new_zeros(sequences, *self.conv_shape, dtype=wide_dtype(projected))
        if self.conv_weight is not None:
            taps = self.conv_weight
            return Heads(*queries_keys_values(projected, taps, conv_tail, self.num_heads, cu_seqlens, self.backend))
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = projected.unflatten(-1, (-1, self.head_dim)).split(heads, dim=-2)
        return Heads(unit_length(q), unit_length(k), v, conv_tail) if self.qk_norm else Heads(q, k, v, conv_tail)

    def normalize(self, readout: Tensor) -> Tensor:
        """Normalise the read-out of each head: (B, N, H, V) -> (B, N, HV)."""
        normed = (unit_rms(readout) if self.output_norm else readout).flatten(-2)
        return normed if self.norm_weight is None else normed * self.norm_weight.to(normed.dtype)

    def gate(self, readout: Tensor, narrow: Tensor | None) -> Tensor:
        """Gate a read-out (B, N, HV), given the narrow side of its gate (B, N, K)."""
        return readout if narrow is None or self.gate_up is None else readout * torch.sigmoid(self.gate_up(narrow))
