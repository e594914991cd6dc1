"""Sequences packed end to end in one row, with offsets ``cu_seqlens``.

Shapes: S packed sequences, T tokens.
"""

import torch
from torch import Tensor


def count_sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences of a batch, packed in one row where there are offsets (S + 1,).

    Raises:
        ValueError: there are offsets, but not one row.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of one, got {batch}")
    return cu_seqlens.shape[0] - 1


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """Raise a ValueError that names a tensor if its shape is not the expected one."""
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(x.shape)}")


def sequence_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the sequence of every token, int64 (T,), on the device of the offsets, integer (S + 1,)."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    # Search all offsets, not a view from the second on: the compiler of PyTorch 2.11 hands kernels the base of a view.
    return torch.searchsorted(cu_seqlens, index, right=True) - 1


def token_positions(start: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the position of every token in its sequence, int64, broadcastable to (B, N).

    Args:
        start: tokens that each sequence has read before, (S,); None for none.
        x: a tensor of the tokens, (B, N, ...).
        cu_seqlens: offsets of S packed sequences.
    """
    device = x.device
    index = torch.arange(x.shape[1], device=device).unsqueeze(0)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        sequence = sequence_numbers(cu_seqlens, x.shape[1])
        return index - cu_seqlens[sequence] + (start.to(device)[sequence] if start is not None else 0)
    return index if start is None else start.to(device).unsqueeze(1) + index
