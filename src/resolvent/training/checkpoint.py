"""Checkpoints: everything a run needs to go on as if it had never stopped, in a folder for each saved step."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from resolvent.errors import CheckpointError
from resolvent.files import atomic_directory, read_json, write_json
from resolvent.models import IntegratedModel, save_model
from resolvent.training.average import Average
from resolvent.training.optimizer import load_optimizer_tensors, optimizer_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
STANDING_FILE = "trainer.json"


@dataclass
class Standing:
    """Where a run stands. The order of the data and dropout's randomness follow from the seed and `step`."""

    step: int
    processes: int
    loss_average: Average

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Standing":
        """The inverse of `dataclasses.asdict`."""
        return cls(values["step"], values["processes"], Average(**values["loss_average"]))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if there is one."""
    return max((run_dir / "checkpoints").glob("step-????????"), default=None)


def save_checkpoint(
    run_dir: Path, model: IntegratedModel, optimizer: torch.optim.Optimizer, standing: Standing, *, keep: int
) -> Path:
    """Save a run's step, then remove all but the `keep` newest checkpoints."""
    target = checkpoint_path(run_dir, standing.step)
    if not target.exists():  # a run that is stopped right after it was resumed has this one already
        with atomic_directory(target) as partial:
            save_model(model, partial)
            save_file(optimizer_tensors(model, optimizer), partial / OPTIMIZER_FILE)
            write_json(partial / STANDING_FILE, asdict(standing))
    for old in sorted(target.parent.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_standing(checkpoint: Path) -> Standing:
    """Read where the run stood.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = checkpoint / STANDING_FILE
    values = read_json(path)
    try:
        return Standing.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold a run's standing: {error!r}") from error


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimiser's state.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    path = checkpoint / OPTIMIZER_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    load_optimizer_tensors(model, optimizer, tensors)
