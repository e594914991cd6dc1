"""What launches of kernels have in common."""

import torch
from torch import Tensor


def contiguous(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """x without gaps, in ``dtype`` where one is given; None stays None."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def more_than_float32(dtype: torch.dtype) -> str | None:
    """Why kernels that compute in float32 refuse tensors of a dtype; None where they take them."""
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"its kernel computes in float32, the tensors are {dtype}"
