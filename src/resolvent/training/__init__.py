"""Training: a configuration, a loop on Accelerate, and run folders that resume exactly."""

import importlib
from typing import TYPE_CHECKING

from resolvent.training.config import TrainingConfig

if TYPE_CHECKING:
    from resolvent.training.config_file import dump_config, load_config
    from resolvent.training.interrupt import Terminated, TrainingInterrupted, terminable
    from resolvent.training.lr_find import RangeTest, find_learning_rate
    from resolvent.training.nonfinite import NonFiniteError
    from resolvent.training.planning import RunPlan, plan_run
    from resolvent.training.processes import leaving_processes
    from resolvent.training.run import resume, train
    from resolvent.training.trainer import TrainingResult

__all__ = [
    "NonFiniteError",
    "RangeTest",
    "RunPlan",
    "Terminated",
    "TrainingConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "dump_config",
    "find_learning_rate",
    "leaving_processes",
    "load_config",
    "plan_run",
    "resume",
    "terminable",
    "train",
]

_HOMES = {
    "run": ("resume", "train"),
    "config_file": ("dump_config", "load_config"),
    "interrupt": ("Terminated", "TrainingInterrupted", "terminable"),
    "lr_find": ("RangeTest", "find_learning_rate"),
    "nonfinite": ("NonFiniteError",),
    "processes": ("leaving_processes",),
    "planning": ("RunPlan", "plan_run"),
    "trainer": ("TrainingResult",),
}


def __getattr__(name: str) -> object:
    # The configuration alone serves `resolvent --help`; torch and Accelerate are loaded with the loop.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
