"""Linear maps: of low rank, and the test for plain ones."""

import torch
from torch import Tensor, nn


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


def is_plain(module: nn.Module) -> bool:
    """Return True if a call of the module is a product with its weight, plus a bias, and nothing else.

    Such a module is no adapter, and no hook or wrapped ``forward`` has to gather the weight first.
    """
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    backward = module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not forward and not backward
