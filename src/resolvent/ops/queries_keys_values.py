"""What a memory is asked, and what it is taught: projections of the tokens that a short convolution has let meet.

``c_t = sum_j weight_j x_{t-j}``, ``y = silu(c)``; of every head the query and the key then get unit length.

Shapes: B batch, N sequence, H heads, K head width, W convolution width, S packed sequences.
"""

from torch import Tensor
from torch.nn import functional as F

from .dispatch import beyond_float32, count_run, select
from .normalize import unit_length
from .short_conv import causal_conv, next_tail


def queries_keys_values(
    projected: Tensor,
    weight: Tensor,
    tail: Tensor,
    num_heads: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve the projections of the tokens and part them into what the heads ask, know and say.

    Args:
        projected: queries, keys and values of all heads side by side, any float (B, N, 3HK).
        weight: taps of the convolution, (W, 3HK); ``weight[0]`` acts on the token itself.
        tail: the W - 1 projections before the first, oldest first, (B, W - 1, 3HK) or (S, W - 1, 3HK).
        num_heads: H.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        queries and keys of unit length and values, (B, N, H, K) in the dtype of ``projected``, and the tail after the
        last token, of the shape and dtype of ``tail``.
    """
    if select(backend, projected.device, "queries_keys_values", beyond_float32(projected.dtype)) == "triton":
        from .triton.queries_keys_values import queries_keys_values as run
    else:
        run = _queries_keys_values_torch
    heads = run(projected, weight, tail, num_heads, cu_seqlens)
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in heads)
    return q, k, v, next_tail(projected, tail, cu_seqlens)


def _queries_keys_values_torch(
    projected: Tensor, weight: Tensor, tail: Tensor, num_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    count_run("queries_keys_values", "torch")
    q, k, v = F.silu(causal_conv(projected, weight.to(projected.dtype), tail, cu_seqlens)).chunk(3, dim=-1)
    q, k = (unit_length(x.unflatten(-1, (num_heads, -1))).flatten(-2) for x in (q, k))
    return q, k, v
