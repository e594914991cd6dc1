"""Compilation of steps of one token with torch.compile, on the CPU."""

import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ..errors import ConfigError

_REMEDY = "leave out --compile, or compile_steps()"
_OF_OBJECT = re.compile(r"(L\[')?self\b")
"""Beginning of the names of guards on the object of a method; releases of PyTorch differ in it."""

_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a class as one piece of compiled code, which is compiled when it is first called.

    The code takes for granted that every object has the structure of the first, and looks at the other arguments alone:
    the guards on all modules of a model would take as long as a tenth of a token.

    Args:
        method: the method, not bound to an object; it computes with tensors, without a branch on their values.
    """
    # PyTorch keeps compiled code with the code of Python, which the results of several calls would share.
    own = types.FunctionType(
        method.__code__.replace(), method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False, options={"guard_filter_fn": _not_on_object})


def _not_on_object(guards: Sequence[Any]) -> list[bool]:
    """Return True for every guard that is not on the object of a method."""
    return [_OF_OBJECT.match(guard.name) is None for guard in guards]


class CompiledSteps:
    """Compiled code of the steps of a model, compiled when a step first runs.

    One piece of code serves one sequence, another any number of more of them. A product whose kernel depends on the
    number of sequences may need a third. A copy, such as that in a deep copy of a model, has code of its own.

    Args:
        compute: method of a program, of tokens (B,), positions (B,) and the states of the layers.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute, self._lock = compute, threading.Lock()
        self._structure: tuple[Any, ...] | None = None
        self._code = compute

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._compute,)

    def step(self, program: object, model: nn.Module) -> Callable[..., Tensor]:
        """Return the compiled step of a program, which holds the weights of a model.

        The code is compiled anew when modules or the layout of weights have changed, and serves other values as it is.
        """
        with self._lock:
            if (structure := _structure(model)) != self._structure:
                self._code, self._structure = compiled(self._compute), structure
            code = self._code

        def run(token: Tensor, position: Tensor, layers: tuple[Any, ...]) -> Tensor:
            if len(token) > 1:
                for x in torch.utils._pytree.tree_leaves((token, position, layers)):
                    if isinstance(x, Tensor):
                        torch._dynamo.maybe_mark_dynamic(x, 0)
            with compiler_errors(_REMEDY), _limits():
                return code(program, token, position, layers)

        return run


@contextmanager
def _limits() -> Iterator[None]:
    """Raise an error of the number of compilations, or of their files, as one that names the remedy."""
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise ConfigError(
            "the step was compiled as often as PyTorch allows, for several settings such as numbers of threads: keep "
            "to some of them, or call compile_steps() again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"PyTorch cannot keep compiled code on disk ({error}): name a folder that can be written in "
            f"TORCHINDUCTOR_CACHE_DIR, or {_REMEDY}"
        ) from error


def _structure(model: nn.Module) -> tuple[Any, ...]:
    """Return what compiled code takes for granted: modules with their constants, and layouts of tensors.

    Constants are numbers, texts and switches, such as that of an adapter. The model itself keeps notes of its calls in
    such attributes, and has its constants in its parts.
    """
    first: dict[int, str] = {}  # a tensor with two names is read once
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    layouts = [(name, first.setdefault(id(x), name), x.dtype, x.shape, x.stride()) for name, x in tensors]
    _, *parts = model.named_modules()
    modules = ((name, type(module), *_constants(_attributes(module))) for name, module in parts)
    return (type(model), *modules, *layouts)


def _attributes(module: nn.Module) -> dict[str, object]:
    """Return the attributes of a module that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}


def _constants(value: object) -> Iterator[object]:
    """Yield the constants in a value, those of dictionaries, lists and tuples among them."""
    if value is None or isinstance(value, bool | int | float | str):
        yield value
    elif isinstance(value, dict):
        for name, x in value.items():
            yield name
            yield from _constants(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _constants(x)


def check_compiler() -> None:
    """Check that steps can be compiled.

    Raises:
        ConfigError: there is no C++ compiler.
    """
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
