"""Which implementation of an operator runs: ``auto``, ``torch`` or ``triton``.

Every operator registers its implementations here under one name and one signature, so that a kernel slots in without
a layer knowing. ``calls`` counts what ran, so that a test or a user can see which path was taken.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError

BACKENDS = ("auto", "torch", "triton")

calls: Counter[tuple[str, str]] = Counter()
"""How often each (operator, back end) ran in this process."""

_library = torch.library.Library("resolvent", "FRAGMENT")
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_refusals: dict[tuple[str, str], Callable[..., str | None]] = {}
_announced: set[tuple[str, str]] = set()
_log = logging.getLogger(__name__)


def register(
    operator: str, backend: str, refuses: Callable[..., str | None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the ``backend`` implementation of ``operator``.

    ``refuses`` says what keeps it from inputs of a dtype and of certain widths, or None: see ``implementation``.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(operator, {})[backend] = function
        if refuses is not None:
            _refusals[operator, backend] = refuses
        return function

    return add


def implementation(
    operator: str, backend: str, device: torch.device, dtype: torch.dtype, *widths: int
) -> Callable[..., Any]:
    """The function that shall run ``operator`` on tensors of a ``device``, a ``dtype`` and certain ``widths``.

    ``auto`` takes the Triton kernel on CUDA and torch elsewhere. Where a kernel is missing or refuses the tensors it
    falls back to torch, says so once in the log, and the fallback shows in ``calls``.

    Raises:
        ConfigError: the back end is unknown, or was asked for by name and cannot serve this operator and these tensors.
    """
    return _implementations[operator][_choose(operator, backend, device, dtype, *widths)]


@torch.compiler.assume_constant_result
def _choose(operator: str, backend: str, device: torch.device, dtype: torch.dtype, *widths: int) -> str:
    """The back end that ``implementation`` shall use; a compiled graph decides once, when it is traced."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    chosen = "torch"
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        obstacle = _obstacle(operator, device, dtype, *widths)
        if not obstacle:
            chosen = "triton"
        elif backend == "triton":
            raise ConfigError(f"backend='triton' cannot run {operator}: {obstacle}; use backend='auto' or 'torch'")
        elif (operator, obstacle) not in _announced:
            _announced.add((operator, obstacle))
            _log.info("running the torch implementation of %s on %s: %s", operator, device, obstacle)
    calls[operator, chosen] += 1
    return chosen


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: make a function of tensors, which changes none of them, the PyTorch operator ``resolvent::name``.

    It is opaque to ``torch.compile``, which asks ``torch.library.register_fake`` and ``register_autograd`` about it.
    This is ``torch.library.custom_op`` without the checks of every call, which cost more time than a kernel runs.
    """

    def add(function: Callable[..., Any]) -> Any:
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.resolvent, name).default

    return add


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on any device and slowly, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(operator: str, device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """What keeps the Triton kernel from running an operator, if anything does."""
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device.type}"
    if not _kernels_are_loaded():
        return "Triton is not installed"
    if "triton" not in _implementations[operator]:
        return "there is no such kernel"
    refuses = _refusals.get((operator, "triton"))
    return refuses(dtype, *widths) if refuses else None


@functools.cache
def _kernels_are_loaded() -> bool:
    """Import the kernels, which register themselves, where there is Triton.

    Call this only where they may run, for the import takes a while.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    importlib.import_module("resolvent.ops.triton")
    return True
