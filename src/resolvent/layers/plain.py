"""Test for linear maps that may be computed from their weight, without a call of the module."""

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Return True if a call of the module is a product with its weight, plus a bias, and nothing else.

    Such a module is no adapter, and no hook or wrapped ``forward`` has to gather the weight first.
    """
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    backward = module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not forward and not backward
