"""Rules of PyTorch 2.11 for compiled `autograd.Function`s: see the docstring of `resolvent.ops`."""

import importlib
import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import resolvent.ops
from resolvent.ops import bk_core, hebbian, memory_rotation, normalize, short_conv, swiglu


class Context:
    """Stands in for what autograd hands to `forward`."""

    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


class Names(TorchFunctionMode):
    """Count the uses of each tensor as a result."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.kept: list[torch.Tensor] = []  # so that no address is given twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.kept.append(result)
            self.count[id(result)] += 1
        return result


def calls() -> dict[type, tuple[Any, ...]]:
    x, decay = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3, 4, 8).cumsum(-1)
    angles = torch.rand(2, 3, 4, 1, 4)
    return {
        normalize._Normalize: (x, 1.0, 1e-5),
        short_conv._DepthwiseConv: (torch.randn(2, 9, 8), torch.randn(4, 8)),
        bk_core._Moebius: (torch.randn(2, 9, 3, dtype=torch.complex64) - 1j, torch.ones(2, 9, 3)),
        hebbian._WithinChunk: (x, x, x, decay),
        memory_rotation._Rotate: (x, angles, angles.cos(), angles.sin()),
        swiglu._SwiGLU: (x,),
        swiglu._SwiGLUProduct: (x, torch.randn(3, 4)),
    }


UNTOUCHED = {
    hebbian._Carry
}  # returns what `cat` and indexing make, of what tests/models/phase2/test_compile.py compiles


def test_all_functions_are_known():
    functions = set()
    for module in pkgutil.iter_modules(resolvent.ops.__path__, "resolvent.ops."):
        for value in vars(importlib.import_module(module.name)).values():
            if (
                isinstance(value, type)
                and issubclass(value, torch.autograd.Function)
                and value.__module__ == module.name
            ):
                functions.add(value)
    assert functions == calls().keys() | UNTOUCHED


@pytest.mark.parametrize("function", calls(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_forward_returns_a_tensor_without_an_alias(function: type, taps: int):
    args = calls()[function]
    if function is short_conv._DepthwiseConv:
        args = (args[0], args[1][:taps])
    names = Names()
    with torch.no_grad(), names:
        result = function.forward(Context(), *args)  # pyrefly: ignore[missing-attribute]
    assert names.count[id(result)] == 1
