"""Linear map with weights in int8, for generation on a CPU.

Shapes: I inputs, O outputs.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEW = 16
"""Tokens up to which PyTorch's product with int8 weights is faster than a product with the weights cast to float."""
_INPUTS = 32
"""PyTorch's product reads its inputs in blocks, beyond the end of a row that holds no whole number of them."""


class Int8Linear(nn.Module):
    """Linear map ``y = x Wᵀ + b`` with ``W_oi = scale_o weight_oi``: int8 weights, and one scale per output.

    A product reads a quarter of the bytes of float32, which is what the product of a single token takes its time for.
    Inputs are rounded to bfloat16, and so are the products of few tokens, each of which is summed up in float32. It has
    no gradient.

    The stored weight has zeros behind the columns of W, up to a multiple of 32.

    Args:
        weight: W, (O, I).
        bias: b, (O,); None for none.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        largest = weight.abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny)
        # The scale is that of the product, bfloat16: weights are rounded to multiples of what they are multiplied by.
        scale = (largest / 127).to(torch.bfloat16)
        rounded = (weight.float() / scale.float().unsqueeze(1)).round().clamp(-127, 127)
        self._padding = (0, -self.in_features % _INPUTS)
        self.register_buffer("weight", F.pad(rounded.to(torch.int8), self._padding))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """Return a layer's map, rounded."""
        return cls(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) -> (..., O) in the dtype of x."""
        flat = F.pad(x.reshape(-1, self.in_features).to(torch.bfloat16), self._padding)
        if len(flat) <= _FEW:
            y = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale).to(x.dtype)
        else:
            y = F.linear(flat.to(x.dtype), self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
