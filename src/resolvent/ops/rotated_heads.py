"""Queries, keys and values of all heads, cut from the projections of the tokens, with queries and keys rotated.

For attention that neither convolves nor normalises before: then it is one pass over memory.

Shapes: B batch, N sequence, H heads of queries, J heads of keys and values, K head width.
"""

import torch
from torch import Tensor

from .dispatch import beyond_float32, select
from .memory_rotation import Rotation, rotate


def rotated_heads(
    projected: Tensor, rotation: Rotation, num_heads: int, num_kv_heads: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut projected tokens into heads, and rotate queries and keys.

    Args:
        projected: queries, keys and values of all heads side by side, (B, N, (H + 2J) K).
        rotation: rotation of the tokens, which has no gradient; packed or not.
        num_heads: H.
        num_kv_heads: J.
        backend: ``auto``, ``torch`` or ``triton``. Where ``torch.compile`` traces, torch code runs, which its compiler
            merges.

    Returns:
        Queries (B, N, H, K), keys (B, N, J, K) and values (B, N, J, K) in the dtype of ``projected``.

    Example:
        >>> projected, turns = torch.randn(1, 70, 4 * 16), torch.rand(1, 70, 8, dtype=torch.float64)
        >>> q, k, v = rotated_heads(projected, Rotation.by(turns, torch.float32), num_heads=2, num_kv_heads=1)
        >>> q.shape, k.shape, torch.equal(v[:, :, 0], projected[..., -16:])
        (torch.Size([1, 70, 2, 16]), torch.Size([1, 70, 1, 16]), True)
    """
    obstacle = beyond_float32(projected.dtype)
    if not torch.compiler.is_compiling() and select(backend, projected.device, "rotated_heads", obstacle) == "triton":
        from .triton.rotated_heads import rotated_heads as run

        return run(projected, rotation, num_heads, num_kv_heads)
    counts = num_heads, num_kv_heads
    turned, values = projected.unflatten(-1, (sum(counts) + num_kv_heads, -1)).split((sum(counts), num_kv_heads), -2)
    q, k = rotate(turned, rotation).split(counts, -2)  # side by side, they are rotated at once
    return q, k, values
