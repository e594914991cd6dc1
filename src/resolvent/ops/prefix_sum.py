"""Running sums whose order of additions is fixed wherever that is asked for."""

import torch
from torch import Tensor
from torch.nn import functional as F


def prefix_sum(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """``x.cumsum(dim, dtype=dtype)``.

    On CUDA that sum may differ in its last bits from one call to the next, and PyTorch refuses it where deterministic
    algorithms are wanted: there it is taken in log N passes.
    """
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return by_doubling(x.to(dtype or x.dtype).movedim(dim, -1)).movedim(-1, dim)
    return x.cumsum(dim, dtype=dtype)


def by_doubling(x: Tensor) -> Tensor:
    """Running sums over the last axis, in passes that add to every sum the one of as many elements before it."""
    reach = 1
    while reach < x.shape[-1]:
        x = x + F.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x
