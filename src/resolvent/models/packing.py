"""Batches of sequences of different lengths: packed end to end, or padded to a rectangle.

Shapes: B batch, N longest sequence, T tokens in all, S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Unpadded(NamedTuple):
    """A padded batch without its padding.

    Attributes:
        tokens: (1, T).
        cu_seqlens: offsets of the B sequences, int64 (B + 1,), on the CPU.
        places: where each token stood in the flat (B * N,) batch, int64 (T,).
    """

    tokens: Tensor
    cu_seqlens: Tensor
    places: Tensor

    def restore(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(1, T, ...) -> (B, N, ...), zero where there was padding."""
        flat = x.new_zeros(shape[0] * shape[1], *x.shape[2:]).index_copy(0, self.places, x[0])
        return flat.unflatten(0, shape)


def unpad(input_ids: Tensor, attention_mask: Tensor) -> Unpadded:
    """Drop the padding of (B, N) tokens; the mask (B, N) is non-zero where there is a token.

    Raises:
        ValueError: the mask does not fit the tokens.
    """
    if attention_mask.shape != input_ids.shape:
        expected, got = tuple(input_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have the shape of input_ids, {expected}, got {got}")
    mask = attention_mask.bool()
    if not mask.any():
        raise ValueError("attention_mask leaves the batch without any token; keep at least one")
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).cpu()
    places = mask.flatten().nonzero().squeeze(1)
    return Unpadded(input_ids.flatten()[places].unsqueeze(0), cu_seqlens, places)


def check_cu_seqlens(cu_seqlens: Tensor, shape: tuple[int, int]) -> None:
    """Raise a ValueError unless the offsets cut a batch of one, shape (1, T), from 0 to T without going back."""
    if shape[0] != 1:
        raise ValueError(f"cu_seqlens needs packed input_ids of shape (1, T), got {shape}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be a list of at least two integers, got {cu_seqlens}")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != shape[1] or sorted(offsets) != offsets:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {shape[1]}, got {offsets}")


def positions(start: Tensor | None, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position of every token in its sequence, int64, broadcastable to (B, N).

    Args:
        start: tokens that each sequence has read before, (S,); None for none.
        input_ids: tokens (B, N).
        cu_seqlens: offsets of S packed sequences.
    """
    device = input_ids.device
    index = torch.arange(input_ids.shape[1], device=device).unsqueeze(0)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device)
        sequence = torch.searchsorted(cu_seqlens[1:], index, right=True)
        return index - cu_seqlens[sequence] + (start.to(device)[sequence] if start is not None else 0)
    return index if start is None else start.to(device).unsqueeze(1) + index
