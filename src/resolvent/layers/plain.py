"""Which linear maps may be computed from their weight, without calling them."""

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether calling it is a product with its weight, a bias and nothing else: no adapter in its place, and no hook or
    wrapped ``forward``, which may have to fetch the weight first."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    backward = module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not forward and not backward
