"""Choice of dtypes: half precision for products of matrices, at least float32 for rates, resonances, norms and sums."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or the dtype of x where it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, in float32 where it is narrower."""
    return x.to(wide_dtype(x))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on a device; one that does nothing where it is off already."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def for_products(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast gives to products, where autocast is on.

    Cast once, x is also kept once for the gradients of all projections that read it.
    """
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if casts else x
