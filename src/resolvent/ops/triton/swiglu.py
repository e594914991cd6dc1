"""Triton kernel of the gate of a SwiGLU network: one pass over memory in the place of two.

Shapes: T tokens, F hidden width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from .launch import rows_of

_kernel: Any = triton.jit
_BLOCK = 1024


@_kernel
def _gate(x, stride, out, F, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < F, x + token * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * F + column, (gate * tl.sigmoid(gate) * value).to(out.dtype.element_ty), mask=inside)


def gated(x: Tensor) -> Tensor:
    """Return ``silu(gate) ⊙ value`` of gates and values side by side: (..., 2F) -> (..., F). It has no gradient."""
    count_run("swiglu", "triton")
    hidden = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], hidden)
    rows = rows_of(x)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(hidden))
        with torch.cuda.device_of(x):
            _gate[(len(rows), triton.cdiv(hidden, block))](rows, rows.stride(0), out, hidden, BLOCK=block, num_warps=4)
    return out
