"""Window of an attention: the keys and values of the last tokens, in a ring buffer.

Token p is in slot ``p mod W``, row by row. A buffer without a window has a slot for every token and grows in blocks.

Shapes: B batch, N sequence, J heads, K key width, V value width, S sequences, W slots, T tokens in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GROWTH = 256
"""Tokens by which a buffer without a window grows at a time."""

ANY_CAPACITY = -1
"""Number of slots in the shape of a buffer that grows."""


class WindowState(NamedTuple):
    """Keys and values of the last tokens, in the dtype in which they were attended to.

    Attributes:
        keys: (B, W, J, K); the key of token p is in slot ``p mod W``. Slots that no token has filled are zero.
        values: (B, W, J, V), likewise.
    """

    keys: Tensor
    values: Tensor


class ReusedWindow(WindowState):
    """A window that its next step overwrites: for a caller that holds the only reference to it, without gradients.

    The slots of each head are side by side in memory, where ``of`` or ``with_capacity`` made it: a step then reads
    every head in one stream, in half the time.
    """

    __slots__ = ()

    @classmethod
    def of(cls, window: WindowState) -> "ReusedWindow":
        """Return a window of the same keys and values, which may share their memory."""
        return cls(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in window))


class Layout(NamedTuple):
    """Layout of the sequences in the flat row of all T tokens, each (S,), where the tokens are.

    Attributes:
        offset: first token of each sequence.
        start: number of tokens that each has read before.
        end: number of tokens that each has read after its last.
    """

    offset: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def of(cls, x: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> "Layout":
        batch, length = x.shape[:2]
        if cu_seqlens is None:
            offsets = torch.arange(batch + 1, device=x.device) * length
        else:
            offsets = cu_seqlens.to(x.device, torch.int64, non_blocking=True)
        start = torch.zeros_like(offsets[1:]) if position is None else position.to(x.device, non_blocking=True)
        return cls(offsets[:-1], start, start + offsets.diff())


def empty_window(sequences: int, capacity: int, k: Tensor, v: Tensor) -> WindowState:
    """Return the window before the first token, for keys like ``k`` (..., J, K) and values like ``v`` (..., J, V)."""
    return WindowState(*(x.new_zeros(sequences, capacity, *x.shape[-2:]) for x in (k, v)))


def join_windows(buffers: list[Tensor]) -> Tensor:
    """Join buffers (B, W, J, K) along the batch; shorter ones, which have not grown as far, are padded with zeros."""
    capacity = max(x.shape[1] for x in buffers)
    return torch.cat([padded(x, 0, capacity - x.shape[1]) for x in buffers])


def _held(end: Tensor, capacity: int) -> Tensor:
    """Return the token in every slot after ``end`` tokens, (S,) -> (S, W); negative where no token has been."""
    last = end.unsqueeze(1) - 1
    return last - (last - torch.arange(capacity, device=end.device)) % capacity


def first_buffer(x: Tensor, capacity: int) -> Tensor:
    """Return the buffer (B, W, J, K) behind the first tokens x (B, N, J, K) of sequences, which may be x itself."""
    length = x.shape[1]
    if length <= capacity:
        return padded(x, 0, capacity - length).contiguous()
    return x[:, length - capacity :].roll(length % capacity, 1)


def next_buffer(x: Tensor, buffer: Tensor | None, layout: Layout, capacity: int) -> Tensor:
    """Return the buffer (S, W, J, K) behind tokens x (B, N, J, K)."""
    flat = x.flatten(0, 1)
    token_SW = _held(layout.end, capacity)
    row_SW = (layout.offset - layout.start).unsqueeze(1) + token_SW
    new = flat[row_SW.clamp(0, len(flat) - 1)]
    is_new = (token_SW >= layout.start.unsqueeze(1))[..., None, None]
    return torch.where(is_new, new, new.new_zeros(()) if buffer is None else buffer)


def in_order(state: WindowState, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values in the order of their tokens, the last in the last slot, and the slots that are filled."""
    capacity = state.keys.shape[1]
    token_SW = start.unsqueeze(1) - capacity + torch.arange(capacity, device=start.device)
    sequence = torch.arange(len(start), device=start.device).unsqueeze(1)
    keys, values = (x[sequence, token_SW % capacity] for x in state)
    return keys, values, token_SW >= 0


def capacity_for(length: int, position: Tensor | None, cu_seqlens: Tensor | None = None) -> int:
    """Return the slots that a buffer without a window needs to hold all tokens; Python reads tensors it is given."""
    if position is None and cu_seqlens is None:
        return in_blocks(length)
    lengths = torch.tensor([length]) if cu_seqlens is None else cu_seqlens.diff()
    return in_blocks(int((lengths if position is None else position + lengths.to(position.device)).max()))


def in_blocks(tokens: int) -> int:
    """Return the slots of a buffer that grows in blocks and holds so many tokens."""
    return max(1, -(-tokens // GROWTH)) * GROWTH


def with_capacity(state: WindowState, capacity: int) -> WindowState:
    """Return the window with at least so many slots: tokens that have no slot yet get one at the end."""
    missing = capacity - state.keys.shape[1]
    if missing <= 0:
        return state
    grown = WindowState(*(padded(x, 0, missing) for x in state))
    return ReusedWindow.of(grown) if isinstance(state, ReusedWindow) else grown


def padded(x: Tensor, before: int, after: int) -> Tensor:
    """Add zeros along the second axis of (B, N, ...)."""
    return F.pad(x, [0, 0] * (x.dim() - 2) + [before, after]) if before or after else x
