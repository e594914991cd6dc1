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

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_announced: set[str] = set()
_log = logging.getLogger(__name__)


def register(operator: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the ``backend`` implementation of ``operator``."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(operator, {})[backend] = function
        return function

    return add


def implementation(operator: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The function that shall run ``operator`` on ``device``.

    ``auto`` takes the Triton kernel on CUDA and torch elsewhere; where a kernel is missing it falls back to torch,
    says so once in the log, and the fallback shows in ``calls``.

    Raises:
        ConfigError: the back end is unknown, or was asked for by name and cannot serve this operator and device.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        _load_kernels()
    available = _implementations[operator]
    if backend == "triton" and (obstacle := _obstacle(operator, device)):
        raise ConfigError(f"backend='triton' cannot run {operator}: {obstacle}; use backend='auto' or 'torch'")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and "triton" in available else "torch"
        if device.type == "cuda" and backend == "torch" and operator not in _announced:
            _announced.add(operator)
            _log.info("%s has no Triton kernel: running the torch implementation on %s", operator, device)
    calls[operator, backend] += 1
    return available[backend]


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on any device and slowly, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(operator: str, device: torch.device) -> str | None:
    """What keeps a kernel from running an operator on a device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if "triton" not in _implementations[operator]:
        return "there is no such kernel"
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device.type}"
    return None


@functools.cache
def _load_kernels() -> None:
    """Import the kernels, which register themselves: only where they may run, for it takes a while."""
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("resolvent.ops.triton")
