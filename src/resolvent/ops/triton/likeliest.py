"""Triton kernels of ``ops.likeliest``: the largest logit of every part of a row, then of the row.

Shapes: B sequences, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from .launch import early, let_next_begin, wait_for_last

_kernel: Any = triton.jit
_PART = 2048
"""Logits of a part: few enough for many programs."""


class _Parts(NamedTuple):
    """Largest logit of every part, NaN where one is not a number, and its index, (B, parts) each."""

    largest: Tensor
    index: Tensor


@_kernel
def _first_largest(values, index, width):
    """Return the largest value, NaN where one is not a number, and the least index of those that have it."""
    top = tl.max(values, 0)  # which may pass over what is not a number
    first = tl.min(tl.where(values == top, index, width - 1), 0)
    return tl.where(tl.sum((values != values).to(tl.int32), 0) > 0, float("nan"), top), first


@_kernel
def _of_parts(logits, stride, parts, width, PART: tl.constexpr, EARLY: tl.constexpr):
    let_next_begin(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, place = part * PART + tl.arange(0, PART), row * tl.num_programs(1) + part
    wait_for_last(EARLY)
    values = tl.load(logits + row * stride + index, mask=index < width, other=-float("inf"))
    largest, first = _first_largest(values, index, width)
    tl.store(parts.largest + place, largest)
    tl.store(parts.index + place, first)


@_kernel
def _of_rows(parts, token, total, count, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    let_next_begin(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = part < count
    wait_for_last(EARLY)
    values = tl.load(parts.largest + row * count + part, mask=there, other=-float("inf"))
    index = tl.load(parts.index + row * count + part, mask=there, other=width - 1)
    before = tl.load(total + row)
    largest, first = _first_largest(values, index, width)
    tl.debug_barrier()  # several threads read the same number: all of them, before one of them writes
    tl.store(token + row, first.to(tl.int64))
    tl.store(total + row, before + largest)


def likeliest(logits: Tensor, token: Tensor, total: Tensor) -> None:
    """See ``ops.likeliest``; logits are float32, neighbours in the last axis."""
    (rows, width), device = logits.shape, logits.device
    count = triton.cdiv(width, _PART)
    parts = _Parts(logits.new_empty(rows, count), torch.empty(rows, count, dtype=torch.int32, device=device))
    count_run("likeliest", "triton")
    with torch.cuda.device_of(logits):
        _of_parts[(rows, count)](logits, logits.stride(0), parts, width, PART=_PART, num_warps=4, **early(device))
        block = triton.next_power_of_2(count)
        _of_rows[(rows,)](parts, token, total, count, width, BLOCK=block, num_warps=1, **early(device))
