"""At least float32: half precision is for products of matrices, not for rates, resonances, norms and long sums."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or the dtype of x where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or x in float32 where it is narrower."""
    return x.to(wide_dtype(x))
