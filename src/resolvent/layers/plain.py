"""Which linear maps may be computed from their weight, without calling them."""

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether calling it is a product with its weight and nothing else: no adapter in its place, and no hook or wrapped
    ``forward``, which may have to fetch the weight first."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked
