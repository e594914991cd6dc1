"""What launches of kernels have in common."""

import torch
from torch import Tensor


def contiguous(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """x without gaps, in ``dtype`` where one is given; None stays None."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()
