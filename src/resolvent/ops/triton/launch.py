"""Helpers of launches."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_kernel: Any = triton.jit


def contiguous(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return x without gaps, in ``dtype`` where one is given; None stays None."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def rows_of(x: Tensor) -> Tensor:
    """Return x (..., C) as rows (T, C), neighbours in a row side by side; a view where the layout allows it.

    There may be gaps between the rows: ``torch.compile`` leaves some between those of a product.
    """
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@functools.lru_cache(maxsize=8)
def early(device: torch.device) -> dict[str, Any]:
    """Return the options of a launch that begins while the launch before it ends, on GPUs that can (Hopper or newer).

    The kernel has a parameter ``EARLY`` for ``let_next_begin``, which comes first, and for ``wait_for_last``, which
    comes before the kernel reads what another launch writes, and before it writes.
    """
    able = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return dict(EARLY=True, launch_pdl=True) if able else dict(EARLY=False)


@_kernel
def let_next_begin(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()


@_kernel
def wait_for_last(EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
