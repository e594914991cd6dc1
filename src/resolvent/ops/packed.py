"""Sequences packed end to end in one row, told apart by their offsets."""

import torch
from torch import Tensor


def sequence_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of every token, int64 (T,) on the device of the offsets, integer (S + 1,)."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    # Searched whole, not from the second offset on: of a view, PyTorch 2.11's compiler hands kernels the beginning of
    # what it is a view of.
    return torch.searchsorted(cu_seqlens, index, right=True) - 1
