"""Training: a configuration, a loop on Accelerate, and run folders that resume exactly."""

import importlib
from typing import TYPE_CHECKING

from resolvent.training.config import TrainingConfig

if TYPE_CHECKING:
    from resolvent.training.interrupt import Terminated, TrainingInterrupted, terminable
    from resolvent.training.nonfinite import NonFiniteError
    from resolvent.training.run import resume, train
    from resolvent.training.trainer import TrainingResult

__all__ = [
    "NonFiniteError",
    "Terminated",
    "TrainingConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "resume",
    "terminable",
    "train",
]

_INTERRUPT = ("Terminated", "TrainingInterrupted", "terminable")


def __getattr__(name: str) -> object:
    # The configuration alone serves `resolvent --help`; torch and Accelerate are loaded with the loop.
    homes = {"train": "run", "resume": "run", "NonFiniteError": "nonfinite", **dict.fromkeys(_INTERRUPT, "interrupt")}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes.get(name, 'trainer')}"), name)
