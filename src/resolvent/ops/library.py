"""Operators that PyTorch knows: ``torch.compile`` does not look into them."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("resolvent", "FRAGMENT")


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors, which changes none of them, the PyTorch operator ``resolvent::name``.

    ``torch.library.register_fake`` and ``register_autograd`` describe the operator to ``torch.compile`` and autograd.
    This is ``torch.library.custom_op`` without its checks at every call, which take longer than a kernel.
    """

    def define(function: Callable[..., Any]) -> Any:
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.resolvent, name).default

    return define
