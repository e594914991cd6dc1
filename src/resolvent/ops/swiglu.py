"""The gate of a SwiGLU feed-forward network.

Shapes: F hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(gate) ⊙ value`` of gates and values side by side (Shazeer, 2020): (..., 2F) -> (..., F).

    Backward computes ``silu(gate)`` again: autograd would keep a tensor as large as the result.

    Example:
        >>> gate, value = torch.randn(2, 1, 70, 32)  # tokens, packed or not
        >>> y = swiglu(torch.cat([gate, value], dim=-1))
        >>> torch.allclose(y, torch.nn.functional.silu(gate) * value)
        True
    """
    return _SwiGLU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _gated(x)


def _gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)], dim=-1)
