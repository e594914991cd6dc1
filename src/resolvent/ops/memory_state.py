"""State of a dissipative Hebbian memory, and the chunks in which its tokens are read.

Shapes: B batch, N sequence, H heads, K key width, V value width, S packed sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import wide_dtype

CHUNK = 64
"""Tokens of a chunk."""


class MemoryState(NamedTuple):
    """State of a memory after the last token that was read, float32 (or float64 with float64 inputs).

    Attributes:
        memory: S, (B, H, K, V).
        forgetting: Γ̄, the sum of Γ dt since the last consolidation, (B, H).

    Without consolidation nothing reads ``forgetting``, and it stays as it is.
    """

    memory: Tensor
    forgetting: Tensor


def empty_state(sequences: int, q: Tensor, v: Tensor) -> MemoryState:
    """Return the state before the first token, for inputs like ``q`` (..., H, K) and ``v`` (..., H, V)."""
    dtype = wide_dtype(q)
    memory = torch.zeros(sequences, *q.shape[-2:], v.shape[-1], dtype=dtype, device=q.device)
    return MemoryState(memory, memory.new_zeros(memory.shape[:2]))


def lengths_and_elapsed(
    q: Tensor, position: Tensor | None, cu_seqlens: Tensor | None, interval: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of every sequence, and the tokens that it has read since its last boundary.

    The latter are zero without an ``interval``. Arguments as in ``dissipative_memory``.
    """
    batch, length = q.shape[:2]
    lengths = (length,) * batch if cu_seqlens is None else tuple(cu_seqlens.diff().tolist())
    if not interval or position is None:
        return lengths, (0,) * len(lengths)
    return lengths, tuple((position % interval).tolist())
