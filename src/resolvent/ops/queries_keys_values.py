"""Short convolution, SiLU and L2 normalisation of queries and keys; convolution and SiLU of values.

``c_t = sum_j weight_j x_{t-j}``, ``y = silu(c)``; the query and the key of every head are then L2-normalised.

Shapes: B batch, N sequence, H heads, K head width, R further columns, W convolution width, S packed sequences.
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute queries, keys and values of all heads from the projections of the tokens.

    Args:
        projected: queries, keys and values of all heads side by side, and R columns of other projections behind them,
            any float (B, N, 3HK + R). One gradient for all columns saves two copies of it.
        weight: taps of the convolution, (W, 3HK); ``weight[0]`` acts on the token itself.
        tail: the conv state, W - 1 projections before the first, oldest first, (B, W - 1, 3HK) or (S, W - 1, 3HK).
        num_heads: H.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        L2-normalised queries and keys, and values, (B, N, H, K) in the dtype of ``projected``; the other columns,
        (B, N, R); and the tail after the last token, of the shape and dtype of ``tail``.

    Example:
        >>> projected, weight = torch.randn(1, 70, 3 * 2 * 16), torch.randn(4, 3 * 2 * 16)  # 2 heads of width 16
        >>> q, k, v, rest, tail = queries_keys_values(projected, weight, torch.zeros(1, 3, 96), num_heads=2)
        >>> offsets = torch.tensor([0, 5, 70])
        >>> *_, tails = queries_keys_values(projected, weight, torch.zeros(2, 3, 96), 2, cu_seqlens=offsets)
        >>> q.shape, rest.shape, tails.shape  # a tail per packed sequence
        (torch.Size([1, 70, 2, 16]), torch.Size([1, 70, 0]), torch.Size([2, 3, 96]))
    """
    if select(backend, projected.device, "queries_keys_values", beyond_float32(projected.dtype)) == "triton":
        from .triton.queries_keys_values import queries_keys_values as run
    else:
        run = _queries_keys_values_torch
    *heads, rest_BNR = run(projected, weight, tail, num_heads, cu_seqlens)
    q_BNHK, k_BNHK, v_BNHK = (x.unflatten(-1, (num_heads, -1)) for x in heads)
    return q_BNHK, k_BNHK, v_BNHK, rest_BNR, next_tail(projected[..., : weight.shape[1]], tail, cu_seqlens)


def _queries_keys_values_torch(
    projected: Tensor, weight_WC: Tensor, tail: Tensor, num_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (B, N, HK) each, and the other columns, (B, N, R)."""
    count_run("queries_keys_values", "torch")
    channels = weight_WC.shape[1]
    projected_BNC, rest_BNR = projected.split([channels, projected.shape[-1] - channels], dim=-1)
    convolved_BNC = causal_conv(projected_BNC, weight_WC.to(projected_BNC.dtype), tail, cu_seqlens)
    q, k, v = F.silu(convolved_BNC).chunk(3, dim=-1)
    q, k = (unit_length(x.unflatten(-1, (num_heads, -1))).flatten(-2) for x in (q, k))
    return q, k, v, rest_BNR
