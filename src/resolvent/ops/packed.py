"""Sequences packed end to end in one row, told apart by their offsets, and what has a row for each of them."""

import torch
from torch import Tensor


def count_sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """Sequences of a batch, packed in one row where there are offsets (S + 1,).

    Raises:
        ValueError: there are offsets, but not one row.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of one, got {batch}")
    return cu_seqlens.shape[0] - 1


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """Raise a ValueError that names a tensor of another shape than the expected one."""
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(x.shape)}")


def sequence_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of every token, int64 (T,) on the device of the offsets, integer (S + 1,)."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    # Searched whole, not from the second offset on: of a view, PyTorch 2.11's compiler hands kernels the beginning of
    # what it is a view of.
    return torch.searchsorted(cu_seqlens, index, right=True) - 1
