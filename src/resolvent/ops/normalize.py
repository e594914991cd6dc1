"""RMS and L2 normalisation, with the gradient written out in half the passes of autograd.

Shapes: D width.
"""

from typing import Any

import torch
from torch import Tensor

from .precision import at_least_float32

RMS_EPS = 1e-5
"""Added to the mean square of a vector that is RMS-normalised."""

LENGTH_EPS = 1e-12
"""Added to the mean square of a vector that is L2-normalised."""


def unit_rms(x: Tensor, eps: float = RMS_EPS) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps)`` over the last axis: (..., D) -> (..., D) in the dtype of x.

    Example:
        >>> x = torch.randn(1, 70, 2, 16)  # tokens, packed or not
        >>> y = unit_rms(x)
        >>> torch.allclose(y.square().mean(-1), torch.ones(1, 70, 2), atol=1e-3)
        True
    """
    return _Normalize.apply(x, 1.0, eps)


def unit_length(x: Tensor) -> Tensor:
    """Return ``x / |x|`` over the last axis, zero for a zero vector: (..., D) -> (..., D) in the dtype of x.

    Example:
        >>> x = torch.randn(1, 70, 2, 16)  # tokens, packed or not
        >>> y = unit_length(x)
        >>> torch.allclose(y.norm(dim=-1), torch.ones(1, 70, 2), atol=1e-3)
        True
    """
    return _Normalize.apply(x, x.shape[-1] ** -0.5, LENGTH_EPS)


class _Normalize(torch.autograd.Function):
    """``y = rms x / sqrt(mean(x²) + eps)``, computed in at least float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rms: float, eps: float) -> Tensor:
        wide = at_least_float32(x)
        inverse = torch.rsqrt(
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps)
        )
        ctx.save_for_backward(x, inverse)
        ctx.rms = rms
        y = wide * (rms * inverse)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # no second name for what is returned: see ops/__init__.py

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, inverse = ctx.saved_tensors
        wide, wide_grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        along = torch.linalg.vecdot(wide, wide_grad).unsqueeze(-1) * inverse.square() / x.shape[-1]
        grad_x = torch.addcmul(wide_grad, wide, along, value=-1).mul_(ctx.rms * inverse)
        return grad_x.to(x.dtype), None, None
