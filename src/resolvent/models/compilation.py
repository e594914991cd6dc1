"""Compilation of steps of one token with torch.compile, on the CPU."""

import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from ..errors import ConfigError

_REMEDY = "leave out --compile, or compile_steps()"
_OF_OBJECT = re.compile(r"(L\[')?self\b")
"""Beginning of the names of guards on the object of a method; releases of PyTorch differ in it."""


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method as one piece of compiled code, which is compiled when it is first called.

    The code takes for granted that the method's object stays as it is, and looks at the arguments alone: the guards on
    all modules of a model would take as long as a tenth of a token.

    Args:
        method: computes with tensors, without a branch on their values.
    """
    function = method.__func__  # type: ignore[attr-defined]
    # PyTorch keeps compiled code with the code of Python, which the methods of several objects share.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    bound = types.MethodType(own, method.__self__)  # type: ignore[attr-defined]
    return torch.compile(bound, fullgraph=True, dynamic=False, options={"guard_filter_fn": _not_on_object})


def _not_on_object(guards: Sequence[Any]) -> list[bool]:
    """Return True for every guard that is not on the object of a method."""
    return [_OF_OBJECT.match(guard.name) is None for guard in guards]


def compiled_step(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return compiled code of a step: a bound method of tokens (B,), positions (B,) and the states of the layers.

    One piece of code serves one sequence, another any number of more of them. A product whose kernel depends on the
    number of sequences may need a third.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    _check_compiler()
    code = compiled(compute)

    def run(token: Tensor, position: Tensor, layers: tuple[Any, ...]) -> Tensor:
        if len(token) > 1:
            for x in torch.utils._pytree.tree_leaves((token, position, layers)):
                if isinstance(x, Tensor):
                    torch._dynamo.maybe_mark_dynamic(x, 0)
        with compiler_errors(_REMEDY):
            return code(token, position, layers)

    return run


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"compiled steps need a C++ compiler, and PyTorch finds none: install g++, name one in CXX, or {_REMEDY}"
        ) from error


@contextmanager
def compiler_errors(remedy: str) -> Iterator[None]:
    """Raise an error of the compiler within the `with` block as one that names the remedy.

    Raises:
        ConfigError: torch.compile cannot compile the model.
    """
    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)  # of the compiler behind Dynamo
        first = str(cause).strip().partition("\n")[0]
        raise ConfigError(
            f"torch.compile cannot compile the model ({type(cause).__name__}: {first}): {remedy}"
        ) from error
