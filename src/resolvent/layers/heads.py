"""Base of the layers that read queries, keys and values: projections and short convolution, norm, gate and output.

Shapes: B batch, N sequence, D model width, H heads of queries, J heads of keys and values, K = V head width, F
features, S packed sequences, W convolution width, C = (H + 2J) K channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.gated_readout import gated_readout
from ..ops.normalize import unit_length, unit_rms
from ..ops.packed import count_sequences
from ..ops.precision import wide_dtype
from ..ops.queries_keys_values import queries_keys_values
from .linear import Projected, is_plain, joined_product, joins, products, split_product


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


class Given(NamedTuple):
    """Inputs of a ``HeadsLayer``, computed from the tokens.

    Attributes:
        heads: queries, keys and values.
        narrow: the narrow side of the gate, (B, N, K); None without a gate.
        qkv: projections from which ``heads`` were made, (B, N, C); None where they lie beside other projections.
    """

    heads: Heads
    narrow: Tensor | None
    qkv: Tensor | None


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
        *,
        num_kv_heads: int | None,
        qk_norm: bool,
        qkv_bias: bool,
        norm_weight: bool,
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

    def given(
        self,
        x: Tensor,
        conv_tail: Tensor | None,
        cu_seqlens: Tensor | None,
        others: Sequence[nn.Linear | None] = (),
    ) -> tuple[Given, Projected]:
        """Compute the layer's inputs from tokens x (B, N, D), and the products of x with other layers.

        Where the products are joined, the operator of the short convolution takes what is not its own along, so that
        all of them have one gradient. The other layers come before the gate: the gradients of V and Γ are real and
        imaginary parts, and the compiler of PyTorch 2.11 fails where a ``cat`` puts such a part behind wide columns.
        """
        beside = [*others, self.gate_down]
        layers = [self.qkv_proj, *beside]
        if self.conv_weight is not None and joins(x, layers):
            heads, rest = self._convolved(joined_product(x, layers), self.conv_weight, conv_tail, cu_seqlens)
            *of_others, narrow = split_product(rest, beside)
            return Given(heads, narrow, None), of_others
        qkv, *of_others, narrow = products(x, layers)
        assert qkv is not None
        return Given(self.heads(qkv, conv_tail, cu_seqlens), narrow, qkv), of_others

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
        if self.conv_weight is not None:
            return self._convolved(projected, self.conv_weight, conv_tail, cu_seqlens)[0]
        if conv_tail is None:
            conv_tail = self._fresh_tail(projected, cu_seqlens)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = projected.unflatten(-1, (-1, self.head_dim)).split(heads, dim=-2)
        return Heads(unit_length(q), unit_length(k), v, conv_tail) if self.qk_norm else Heads(q, k, v, conv_tail)

    def _convolved(
        self, projected: Tensor, taps: Tensor, conv_tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Heads, Tensor]:
        """Compute queries, keys and values of projected tokens (B, N, C + R); return them and the last R columns."""
        if conv_tail is None:
            conv_tail = self._fresh_tail(projected, cu_seqlens)
        q, k, v, rest, conv_tail = queries_keys_values(
            projected, taps, conv_tail, self.num_heads, cu_seqlens, self.backend
        )
        return Heads(q, k, v, conv_tail), rest

    def _fresh_tail(self, projected: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the conv state in front of the first token."""
        sequences = count_sequences(projected.shape[0], cu_seqlens)
        return projected.new_zeros(sequences, *self.conv_shape, dtype=wide_dtype(projected))

    def gated(self, readout: Tensor, narrow: Tensor | None, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise and gate a read-out, and put features behind it.

        Args:
            readout: read-out of the heads, (B, N, H, V).
            narrow: the narrow side of the gate, (B, N, K); None without a gate.
            features: (B, N, F); None for none.

        Returns:
            The normalised read-out, (B, N, HV), and the gated one with the features, (B, N, HV + F).
        """
        fused = self.output_norm and self.norm_weight is None
        if fused and narrow is not None and self.gate_up is not None and is_plain(self.gate_up):
            opening = F.linear(narrow, self.gate_up.weight)
            return gated_readout(readout, opening, self.gate_up.bias, features, self.backend)
        normalized = self.normalize(readout)
        gated = self.gate(normalized, narrow)
        return normalized, gated if features is None else torch.cat([gated, features.to(gated.dtype)], dim=-1)

    def normalize(self, readout: Tensor) -> Tensor:
        """Normalise the read-out of each head: (B, N, H, V) -> (B, N, HV)."""
        normed = (unit_rms(readout) if self.output_norm else readout).flatten(-2)
        return normed if self.norm_weight is None else normed * self.norm_weight.to(normed.dtype)

    def gate(self, readout: Tensor, narrow: Tensor | None) -> Tensor:
        """Gate a read-out (B, N, HV), given the narrow side of its gate (B, N, K)."""
        return readout if narrow is None or self.gate_up is None else readout * torch.sigmoid(self.gate_up(narrow))
