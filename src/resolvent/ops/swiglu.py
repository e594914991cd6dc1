"""The gate of a SwiGLU feed-forward network, and the product behind it.

Shapes: F hidden width, D model width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import beyond_float32, select


def swiglu(x: Tensor, backend: str = "auto") -> Tensor:
    """Return ``silu(gate) ⊙ value`` of gates and values side by side (Shazeer, 2020): (..., 2F) -> (..., F).

    Backward computes ``silu(gate)`` again: autograd would keep a tensor as large as the result. ``backend`` is
    ``auto``, ``torch`` or ``triton``, whose kernel runs where no gradient is needed and ``torch.compile``, which merges
    torch code, does not trace.

    Example:
        >>> gate, value = torch.randn(2, 1, 70, 32)  # tokens, packed or not
        >>> y = swiglu(torch.cat([gate, value], dim=-1))
        >>> torch.allclose(y, torch.nn.functional.silu(gate) * value)
        True
    """
    return _SwiGLU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _gated(x, backend)


def _gated(x: Tensor, backend: str) -> Tensor:
    if not torch.compiler.is_compiling() and select(backend, x.device, "swiglu", beyond_float32(x.dtype)) == "triton":
        from .triton.swiglu import gated

        return gated(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def swiglu_product(x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """Return ``swiglu(x) @ weight.T``: x (..., 2F) and weight (D, F), of one dtype -> (..., D).

    Backward computes ``swiglu(x)`` again: autograd would keep it. Where ``torch.compile`` traces, its
    partitioner decides what is kept. ``backend`` is that of ``swiglu``.

    Example:
        >>> x, weight = torch.randn(1, 70, 64), torch.randn(16, 32)  # tokens, packed or not
        >>> y = swiglu_product(x, weight)
        >>> torch.allclose(y, swiglu(x) @ weight.T, atol=1e-4)
        True
    """
    if torch.compiler.is_compiling():
        return F.linear(swiglu(x, backend), weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _SwiGLUProduct.apply(x, weight)
    return F.linear(_gated(x, backend), weight)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x, "torch")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        return _gradient(grad, gate, value, F.silu(gate))


class _SwiGLUProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(_gated(x, "torch"), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        opened, grad_weight = F.silu(gate), None
        if ctx.needs_input_grad[1]:  # a frozen weight has none
            grad_weight = grad.flatten(0, -2).mT @ (opened * value).flatten(0, -2)
        return _gradient(grad @ weight, gate, value, opened), grad_weight


def _gradient(grad: Tensor, gate: Tensor, value: Tensor, opened: Tensor) -> Tensor:
    """Return the gradient of gates and values side by side, given that of the result, and ``silu(gate)``."""
    return torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * opened], dim=-1)
