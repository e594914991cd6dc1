"""Choice between an operator's torch code and its Triton kernels, and a count of what ran.

Every operator's file calls ``select`` for its tensors and imports its kernels when it first launches them.
"""

import functools
import importlib.util
import logging
import os
from collections import Counter
from typing import Literal

import torch

from ..errors import ConfigError

Implementation = Literal["torch", "triton", "varlen"]
"""Torch code, Triton kernels, or PyTorch's ``varlen_attn``."""

BACKENDS = ("auto", "torch", "triton")

calls: Counter[tuple[str, str]] = Counter()
"""Runs of each (operator, implementation) in this process.

A kernel counts where it is launched, torch code where it runs; ``select`` counts nothing. What ``torch.compile`` made
of torch code and what a CUDA graph replays counts once, when it is traced or captured.
"""

_announced: set[tuple[str, str]] = set()
_log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def select(backend: str, device: torch.device, operator: str, obstacle: str | None = None) -> Implementation:
    """Choose the implementation of ``operator`` for tensors on ``device``.

    ``auto`` takes the kernels on CUDA and torch code elsewhere. Where the kernels cannot run, ``auto`` falls back to
    torch code and logs the reason once. A compiled graph chooses once, when it is traced.

    Args:
        backend: ``auto``, ``torch`` or ``triton``.
        device: device of the tensors.
        operator: name of the operator, for the message and the log.
        obstacle: reason why the operator's kernels cannot take these tensors; None if they can.

    Raises:
        ConfigError: the backend is unknown, or it is ``triton`` and the kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    obstacle = _no_triton(device) or obstacle
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ConfigError(f"backend='triton' cannot run {operator}: {obstacle}; use backend='auto' or 'torch'")
    if (operator, obstacle) not in _announced:
        _announced.add((operator, obstacle))
        _log.info("running the torch implementation of %s on %s: %s", operator, device, obstacle)
    return "torch"


@torch.compiler.assume_constant_result
def count_run(operator: str, implementation: Implementation) -> None:
    """Count a run in ``calls``."""
    calls[operator, implementation] += 1


def interpreting() -> bool:
    """Return True if Triton interprets its kernels, on any device and slowly, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def beyond_float32(dtype: torch.dtype) -> str | None:
    """Return the obstacle of kernels that compute in float32; None if they take tensors of ``dtype``."""
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"its kernel computes in float32, the tensors are {dtype}"


def _no_triton(device: torch.device) -> str | None:
    """Return the reason why no kernel runs on ``device``; None if kernels do."""
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device.type}"
    return None if _triton_is_installed() else "Triton is not installed"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
