"""Triton kernels for attention of one token of every sequence over a window that is overwritten.

One token has too few queries to fill a GPU. So the slots are cut into parts: a program reads a part for all queries of
a head of keys and values, and the program whose part has the token's slot writes the token there. A second launch joins
the parts.

Shapes: B sequences, J heads of keys and values, G queries of each, H = JG heads, K key width, V value width, W slots, P
parts.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_window import ReusedWindow
from ..dispatch import count_run
from .arguments import constexpr

_kernel: Any = triton.jit
_BLOCK = 64
"""Slots that a program loads at once."""
_LEAST_PART, _MOST_PARTS = 256, 64
_LEAST_TILE = 16
"""Least side of a product on the tensor cores."""


class _Token(NamedTuple):
    """Queries (B, H, K), keys (B, J, K) and values (B, J, V) of the token, and tokens read before, (B,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    position: Tensor


class _Buffers(NamedTuple):
    """Keys and values of the slots, with their strides from sequence to sequence, slot to slot and head to head.

    In a kernel a tuple has a field ``values`` of its own.
    """

    k: Tensor
    v: Tensor
    k_sequence: int
    k_slot: int
    k_head: int
    v_sequence: int
    v_slot: int
    v_head: int


class _Parts(NamedTuple):
    """Largest score of every part and head, (B, H, P), sum of its weights, and weighted values (B, H, P, V)."""

    largest: Tensor
    total: Tensor
    weighted: Tensor


class _Sizes(NamedTuple):
    """Numbers that the kernels are compiled for; those with a B are padded to a power of two."""

    G: int
    K: int
    V: int
    BG: int
    BK: int
    BV: int


@_kernel
def _with_own(buffer, row, new, columns, width, own, there):
    """Load rows of a buffer; put the token in its row, in the dtype of the buffer, and store it there."""
    inside = columns[None, :] < width
    rows = tl.load(buffer + row[:, None] + columns[None, :], mask=there[:, None] & inside, other=0.0)
    token = tl.load(new + columns, mask=columns < width, other=0.0).to(rows.dtype)
    rows = tl.where(own[:, None], token[None, :], rows)
    tl.store(buffer + row[:, None] + columns[None, :], rows, mask=own[:, None] & inside)
    return rows


@_kernel
def _read_parts(token, buffers, parts, scale, J, W, PART, sizes: constexpr, BLOCK: tl.constexpr):
    G: tl.constexpr = sizes.G
    K: tl.constexpr = sizes.K
    V: tl.constexpr = sizes.V
    BG: tl.constexpr = sizes.BG
    BK: tl.constexpr = sizes.BK
    BV: tl.constexpr = sizes.BV
    pair, part, count = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    sequence, head = pair // J, pair % J
    of_key, of_value, group = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BG)
    read = tl.load(token.position + sequence)
    slot, filled = (read % W).to(tl.int32), tl.minimum(read + 1, W).to(tl.int32)
    is_query = (group < G)[:, None] & (of_key < K)[None, :]
    q = tl.load(token.q + (pair * G + group)[:, None] * K + of_key[None, :], mask=is_query, other=0.0)
    largest = tl.full([BG], float("-inf"), tl.float32)
    total, values = tl.zeros([BG], tl.float32), tl.zeros([BG, BV], tl.float32)
    keys_at = buffers.k + sequence * buffers.k_sequence + head * buffers.k_head
    values_at = buffers.v + sequence * buffers.v_sequence + head * buffers.v_head
    last = tl.minimum((part + 1) * PART, filled)
    for start in tl.range(part * PART, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        there, own = row < last, row == slot
        k = _with_own(keys_at, row.to(tl.int64) * buffers.k_slot, token.k + pair * K, of_key, K, own, there)
        v = _with_own(values_at, row.to(tl.int64) * buffers.v_slot, token.v + pair * V, of_value, V, own, there)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
        weights, kept = tl.exp(scores - largest[:, None]), tl.exp(before - largest)
        total = total * kept + tl.sum(weights, 1)
        values = values * kept[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    at = (pair * G + group) * count + part
    tl.store(parts.largest + at, largest, mask=group < G)
    tl.store(parts.total + at, total, mask=group < G)
    is_value = (group < G)[:, None] & (of_value < V)[None, :]
    tl.store(parts.weighted + at[:, None] * V + of_value[None, :], values, mask=is_value)


@_kernel
def _join_parts(parts, out, count, V: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr):
    head, part, column = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, BV)
    there, at = part < count, head * count + part
    largest = tl.load(parts.largest + at, mask=there, other=float("-inf"))
    weight = tl.exp(largest - tl.max(largest, 0))  # 0 for a part of which no slot is filled
    total = tl.sum(weight * tl.load(parts.total + at, mask=there, other=0.0), 0)
    inside = there[:, None] & (column < V)[None, :]
    values = tl.load(parts.weighted + at[:, None] * V + column[None, :], mask=inside, other=0.0)
    result = tl.sum(weight[:, None] * values, 0) / total
    tl.store(out + head * V + column, result.to(out.dtype.element_ty), mask=column < V)


def attention_step(q: Tensor, k: Tensor, v: Tensor, scale: float, window: ReusedWindow, position: Tensor) -> Tensor:
    """Write a token of every sequence into its window, and attend from it.

    Args:
        q: queries, (B, H, K).
        k: keys, (B, J, K).
        v: values, (B, J, V).
        scale: factor of the scores.
        window: window before the token, which is overwritten; the channels of a head are side by side.
        position: tokens that each sequence has read before, (B,), on the device.

    Returns:
        The read-out, (B, H, V), in the dtype of ``v``.
    """
    count_run("local_attention_step", "triton")
    (batch, heads, width), groups, of_values = q.shape, k.shape[1], v.shape[-1]
    slots = window.keys.shape[1]
    part = max(_LEAST_PART, triton.cdiv(slots, _MOST_PARTS * _BLOCK) * _BLOCK)
    count = triton.cdiv(slots, part)
    out = v.new_empty(batch, heads, of_values)
    largest, total = (q.new_empty(batch, heads, count, dtype=torch.float32) for _ in range(2))
    parts = _Parts(largest, total, q.new_empty(batch, heads, count, of_values, dtype=torch.float32))
    padded = [max(_LEAST_TILE, triton.next_power_of_2(n)) for n in (heads // groups, width, of_values)]
    sizes = _Sizes(heads // groups, width, of_values, *padded)
    buffers = _Buffers(*window, *window.keys.stride()[:3], *window.values.stride()[:3])
    token = _Token(q.contiguous(), k.contiguous(), v.contiguous(), position)
    with torch.cuda.device_of(q):
        _read_parts[(batch * groups, count)](
            token, buffers, parts, scale, groups, slots, part, sizes, BLOCK=_BLOCK, num_warps=4
        )
        _join_parts[(batch * heads,)](
            parts, out, count, V=of_values, BV=padded[2], PARTS=triton.next_power_of_2(count), num_warps=4
        )
    return out
