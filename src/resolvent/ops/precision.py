"""Dtypes: half precision for matrix products, at least float32 for rates, resonances, norms and long sums."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or the dtype of x where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x itself, or x in float32 where it is narrower."""
    return x.to(wide_dtype(x))


def for_products(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast gives to products, where it is on.

    Cast once, it is also kept once for the gradients of all the projections that read it.
    """
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if casts else x
