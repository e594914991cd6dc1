"""Local attention layer: softmax attention over the last tokens, in the place of a memory.

Shapes: B batch, N sequence, D model width, H heads of queries, J heads of keys and values, K = V head width, F
features, S packed sequences, W window.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import WindowState, local_attention
from ..ops.attention_window import ANY_CAPACITY
from ..ops.memory_rotation import Rotation, rotate
from ..ops.packed import token_positions
from ..ops.precision import at_least_float32, for_products, wide_dtype
from ..ops.rotary import Scaling, rotary_turns
from ..ops.rotated_heads import rotated_heads
from .heads import Given, Heads, HeadsLayer


class AttentionOutput(NamedTuple):
    """Output and state of the layer.

    Attributes:
        gated: gated read-out, which ``out_proj`` takes to the residual stream, with the features behind it,
            (B, N, HV + F).
        readout: read-out of the attention, normalised and not gated, (B, N, HV).
        values: values that were attended to, (B, N, J, V).
        state: keys and values of the window after the last token; None where they were not asked for.
        conv_tail: conv state: the last inputs of the convolution, (B, taps - 1, C) or (S, taps - 1, C).
    """

    gated: Tensor
    readout: Tensor
    values: Tensor
    state: WindowState | None
    conv_tail: Tensor


class LocalAttentionLayer(HeadsLayer):
    """Attention of every token over the last ``window`` tokens.

    A short causal convolution mixes neighbouring tokens before q, k and v. Queries and keys are L2-normalised and then
    rotated by their positions; the temperature, the factor of their product, is one positive number per head. Without
    ``qk_norm`` the temperature is fixed at ``1 / sqrt(head_dim)``. The read-out of each head is RMS-normalised and
    multiplied by a gate of low rank.

    Args:
        d_model: width D.
        num_heads: heads H.
        head_dim: width of keys and values, even.
        window: number of tokens that a token attends to, itself among them; None for all.
        conv_size: tokens that the convolution spans; 1 for none.
        output_norm: RMS-normalise the read-out of each head.
        output_gate: gate the read-out with ``sigmoid`` of a projection of rank ``head_dim``.
        backend: ``auto``, ``torch`` or ``triton``.
        num_kv_heads: heads J of keys and values; None for H.
        qk_norm: L2-normalise queries and keys, and train the temperature.
        qkv_bias: add biases to q, k and v.
        rotary_base: base of the rotary positions.
        rotary_scaling: scaling of the rotary positions; None for none.
    """

    TEMPERATURE = 10.0
    """Initial temperature of every head."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        window: int | None,
        conv_size: int = 4,
        output_norm: bool = True,
        output_gate: bool = True,
        backend: str = "auto",
        num_kv_heads: int | None = None,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        rotary_base: float = 10_000.0,
        rotary_scaling: Scaling | None = None,
    ):
        super().__init__(
            d_model,
            num_heads,
            head_dim,
            conv_size,
            output_norm,
            output_gate,
            backend,
            num_kv_heads=num_kv_heads,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            norm_weight=False,
        )
        self.window, self.rotary_base, self.rotary_scaling = window, rotary_base, rotary_scaling
        self.log_temperature = nn.Parameter(torch.empty(num_heads)) if qk_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters with a fixed start: the temperature, and a convolution that passes the token through."""
        super().reset_parameters()
        if self.log_temperature is not None:
            self.log_temperature.fill_(self.TEMPERATURE).log_()

    @property
    def temperature(self) -> Tensor | float:
        """Factor of the scores: of every head, (H,) float32 or wider, or one for all that is not trained."""
        if self.log_temperature is None:
            return self.head_dim**-0.5
        return at_least_float32(self.log_temperature).exp()

    @property
    def state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one sequence's keys, (W, J, K) and as large as those of its values, and of its conv state."""
        return (self.window or ANY_CAPACITY, self.num_kv_heads, self.head_dim), self.conv_shape

    def turns(self, position: Tensor) -> Tensor:
        """Return the turns of the pairs of channels at positions (...), float64 (..., K / 2)."""
        return rotary_turns(position, self.head_dim, self.rotary_base, self.rotary_scaling)

    def rotation(self, position: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation of tokens at positions, broadcastable to (B, N), for queries and keys of ``dtype``."""
        return Rotation.by(self.turns(position), dtype)

    def rotated(self, heads: Heads, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys that are rotated by the positions of their tokens, broadcastable to (B, N)."""
        rotation = self.rotation(position, wide_dtype(heads.q))
        return rotate(heads.q, rotation), rotate(heads.k, rotation)

    def _rotated_heads(self, given: Given, rotation: Rotation) -> Heads:
        """Return the heads of tokens, with queries and keys rotated."""
        heads, _, qkv = given
        if qkv is None or self.qk_norm or self.conv_weight is not None:
            return heads._replace(q=rotate(heads.q, rotation), k=rotate(heads.k, rotation))
        q, k, v = rotated_heads(qkv, rotation, self.num_heads, self.num_kv_heads, self.backend)
        return heads._replace(q=q, k=k, v=v)

    def distances(self, x: Tensor) -> Tensor:
        """Return how many tokens each head looks back on average, (B, N, H), in texts (B, N, D) from their start on.

        Positions replace the values: no matrix of weights is made.
        """
        heads = self.heads(self.qkv_proj(x), None, None)
        position = torch.arange(x.shape[1], device=x.device)
        q, k = self.rotated(heads, position.unsqueeze(0))
        values = torch.zeros_like(heads.v)
        values[..., 0] = position[:, None].to(values)
        mean, _ = local_attention(q, k, values, self.temperature, self.window, backend=self.backend, return_state=False)
        return (position[:, None] - mean[..., 0]).clamp(min=0)

    def forward(
        self,
        x: Tensor,
        state: WindowState | None = None,
        conv_tail: Tensor | None = None,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        given: Given | None = None,
        rotation: Rotation | None = None,
        features: Tensor | None = None,
        return_state: bool = True,
    ) -> AttentionOutput:
        """Attend to tokens.

        Args:
            x: tokens, (B, N, D).
            state: window before the first token, one row per sequence; needs ``position``.
            conv_tail: conv state before the first token, float32.
            position: tokens that each sequence has read before, (B,) or (S,).
            cu_seqlens: offsets of S packed sequences.
            given: inputs that were computed from x before; None to compute them.
            rotation: that of the tokens' positions, where it is known.
            features: put behind the gated read-out, (B, N, F); None for none.
            return_state: compute the window after the last token.
        """
        x = for_products(x)
        if given is None:
            given, _ = self.given(x, conv_tail, cu_seqlens)
        if rotation is None:
            rotation = self.rotation(token_positions(position, x, cu_seqlens), wide_dtype(given.heads.q))
        heads = self._rotated_heads(given, rotation)
        readout, state = local_attention(
            heads.q,
            heads.k,
            heads.v,
            self.temperature,
            self.window,
            initial_state=state,
            position=position,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            return_state=return_state,
        )
        readout, gated = self.gated(readout, given.narrow, features)
        return AttentionOutput(gated, readout, heads.v, state, heads.conv_tail)
