"""Where to compute."""

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
