"""Gated feed-forward network.

Shapes: D model width, F hidden width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.precision import for_products
from ..ops.swiglu import swiglu, swiglu_product
from .linear import is_plain

_MULTIPLE = 32


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): ``W_out (silu(W_gate x) ⊙ W_value x)``; one matrix holds both inner maps.

    Args:
        d_model: width D.
        hidden: width F.
        backend: ``auto``, ``torch`` or ``triton``.
    """

    stacked: ClassVar[dict[str, int]] = {"in_proj": 2}
    """Projections that lie on top of each other in one weight, which an optimizer of matrices takes apart."""

    def __init__(self, d_model: int, hidden: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.in_proj = nn.Linear(d_model, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) -> (..., D)."""
        if self._halves_fit(x):
            gate, value = (F.linear(x, half) for half in self.in_proj.weight.chunk(2))
            return self.out_proj(F.silu(gate).mul_(value))
        inner = self.in_proj(x)
        if is_plain(self.out_proj):
            return swiglu_product(inner, for_products(self.out_proj.weight), self.backend)
        return self.out_proj(swiglu(inner, self.backend))

    def _halves_fit(self, x: Tensor) -> bool:
        """Return True if gates and values are better products of their own.

        On a CPU those of many tokens then stay in its cache until they are multiplied, and nothing is kept for a
        gradient.
        """
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return x.numel() > x.shape[-1] and is_plain(self.in_proj)


def gated_width(plain: int) -> int:
    """Return the hidden width at which a gated network has about as many parameters as a plain one.

    It is two thirds of the plain one's width, as a multiple of 32.
    """
    return _MULTIPLE * max(1, round(plain * 2 / (3 * _MULTIPLE)))
