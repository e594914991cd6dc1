"""Where to compute, and whether the same bits shall come of it every time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from resolvent.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device that `auto` (CUDA where there is one), `cpu` or `cuda` stands for.

    Raises:
        ConfigError: CUDA is asked for where there is none, or the name is another.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device is cuda, but PyTorch finds no CUDA device: use cpu, or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Let CUDA give the same bits for the same inputs as long as the block lasts; the CPU always does.

    The operators' kernels add up in a fixed order anyway; this is for PyTorch's own. cuBLAS looks at its workspace when
    a process first uses it: begin here.

    Args:
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # takes time, and nobody reads what nobody wrote
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
