"""Linear maps: of low rank, several of them in one product, and the test for plain ones."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankLinear(nn.Module):
    """Linear map through ``rank`` channels: ``x -> up(down(x))``.

    Args:
        in_features: width of x.
        out_features: width of the result.
        rank: channels between them.
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) -> (..., out)."""
        return self.up(self.down(x))

    @torch.no_grad()
    def dense(self) -> tuple[Tensor, Tensor]:
        """Return weight (out, in) and bias (out,) of the same map as one matrix, multiplied on the CPU in float64."""
        down, up = (layer.weight.to("cpu", torch.float64) for layer in (self.down, self.up))
        return (up @ down).to(self.up.weight.dtype), self.up.bias.cpu().clone()


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return True if a call of the module is a product with its weight, plus a bias, and nothing else.

    Such a module is no adapter, and no hook or wrapped ``forward`` has to gather the weight first.
    """
    return type(module) is nn.Linear and not has_hook(module)


def has_hook(module: nn.Module) -> bool:
    """Return True if a call of the module does more than its class says: by a hook, or a ``forward`` of its own."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


Projected = Sequence[Tensor | None]
"""Products of the tokens with several layers, None for a layer that there is not."""


def products(x: Tensor, layers: Sequence[nn.Linear | None]) -> list[Tensor | None]:
    """Return the products of x (..., D) with several layers, None for None.

    Where joining pays (``joins``) it is one product with their concatenated weights, which reads x once.
    """
    if joins(x, layers):
        return split_product(joined_product(x, layers), layers)
    return [None if layer is None else layer(x) for layer in layers]


def joined_product(x: Tensor, layers: Sequence[nn.Linear | None]) -> Tensor:
    """Return the products of x (..., D) with several plain layers side by side, (..., R)."""
    present = [layer for layer in layers if layer is not None]
    return F.linear(x, torch.cat([layer.weight for layer in present]), _biases(present))


def split_product(joined: Tensor, layers: Sequence[nn.Linear | None]) -> list[Tensor | None]:
    """Return the parts of a ``joined_product``, None for None."""
    widths = [0 if layer is None else layer.out_features for layer in layers]
    parts = joined.split(widths, dim=-1)
    return [None if layer is None else part for layer, part in zip(layers, parts, strict=True)]


def joins(x: Tensor, layers: Sequence[nn.Linear | None]) -> bool:
    """Return True if one product with the concatenated weights of layers takes the place of a product with each."""
    present = [layer for layer in layers if layer is not None]
    return len(present) > 1 and _launches_cost(x.device) and all(map(is_plain, present))


def _launches_cost(device: torch.device) -> bool:
    """Return True if a launch costs more than the concatenation of weights, anew at every call: not on a CPU."""
    return device.type != "cpu"


def _biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Return the concatenated biases of layers, zeros where a layer has none; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    )


def product_of_parts(joined: Tensor, widths: Sequence[int], layers: Sequence[nn.Linear]) -> Tensor:
    """Return the sum of the products of parts of a tensor (..., ΣD_i), of widths D_i, each with its layer: (..., R).

    Where joining pays (``joins``) and no layer has a bias, it is one product with their concatenated columns.
    """
    if joins(joined, layers) and all(layer.bias is None for layer in layers):
        return F.linear(joined, torch.cat([layer.weight for layer in layers], dim=1))
    first, *others = (layer(x) for x, layer in zip(joined.split(list(widths), dim=-1), layers, strict=True))
    return sum(others, start=first)
