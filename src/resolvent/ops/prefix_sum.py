"""Running sums with a fixed order of additions where deterministic algorithms are wanted."""

import torch
from torch import Tensor
from torch.nn import functional as F


def prefix_sum(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``x.cumsum(dim, dtype=dtype)``.

    On CUDA, ``cumsum`` may differ in its last bits from one call to the next, and PyTorch refuses it where
    deterministic algorithms are wanted: there the sum is taken in log N passes.

    Example:
        >>> x = torch.ones(1, 70)
        >>> sums = prefix_sum(x, dtype=torch.float64)
        >>> sums[0, -1]
        tensor(70., dtype=torch.float64)
    """
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return by_doubling(x.to(dtype or x.dtype).movedim(dim, -1)).movedim(-1, dim)
    return x.cumsum(dim, dtype=dtype)


def by_doubling(x: Tensor) -> Tensor:
    """Return running sums over the last axis, in passes that add to every sum the sum of as many elements before."""
    reach = 1
    while reach < x.shape[-1]:
        x = x + F.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x
