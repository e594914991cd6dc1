"""Choice of the device, and deterministic algorithms on CUDA."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from resolvent.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of a name: `auto` (CUDA if there is a device), `cpu` or `cuda`.

    Raises:
        ConfigError: there is no CUDA device, or the name is unknown.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device is cuda, but PyTorch finds no CUDA device: use cpu, or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Make CUDA deterministic within the block, bit for bit; the CPU always is.

    The kernels of the operators sum in a fixed order anyway; this is for those of PyTorch. The setting is global: where
    blocks of several threads overlap, it holds for all of them until the last one ends. cuBLAS reads its workspace
    setting at its first use in a process, so that the block has to begin before that.

    Args:
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _deterministic.begin()
    try:
        yield
    finally:
        _deterministic.end()


class _Deterministic:
    """Reference count of blocks for which PyTorch's deterministic algorithms are on."""

    def __init__(self) -> None:
        self._memory: Any = torch.utils.deterministic
        self._lock, self._blocks, self._before = threading.Lock(), 0, (False, True)

    def begin(self) -> None:
        with self._lock:
            if not self._blocks:
                self._before = torch.are_deterministic_algorithms_enabled(), self._memory.fill_uninitialized_memory
                self._set(True, False)  # no operator reads uninitialised memory, and filling it takes time
            self._blocks += 1

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self._set(*self._before)

    def _set(self, algorithms: bool, fill_memory: bool) -> None:
        torch.use_deterministic_algorithms(algorithms)
        self._memory.fill_uninitialized_memory = fill_memory


_deterministic = _Deterministic()
