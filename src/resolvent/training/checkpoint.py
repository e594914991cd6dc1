"""Checkpoints: everything a run needs to go on as if it had never stopped, in a folder for each saved step."""

import hashlib
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resolvent.errors import CheckpointError, VersionError
from resolvent.files import atomic_directory, check_version, partial_name, read_json, shown, write_json
from resolvent.manifest import check_files, write_manifest
from resolvent.models import IntegratedModel
from resolvent.models.storage import CONFIG, WEIGHTS, write_config, write_weights
from resolvent.tensors import read_tensors, write_tensors
from resolvent.training.average import Average
from resolvent.training.optimizer import load_optimizer_tensors, optimizer_tensors

FORMAT_VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"
STANDING_FILE = "trainer.json"

_FILES = (CONFIG, WEIGHTS, OPTIMIZER_FILE, STANDING_FILE)
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class Standing:
    """Where a run stands. The order of the data and dropout's randomness follow from the seed and `step`.

    Attributes:
        step: steps taken.
        processes: those that share the work.
        loss_average: the smoothed loss.
        metrics_sha256: of the metrics written so far.
        rewinds: times that the run went back because something was not finite.
    """

    step: int
    processes: int
    loss_average: Average
    metrics_sha256: str = hashlib.sha256().hexdigest()
    rewinds: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Standing":
        """The inverse of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError: values that it does not give.
        """
        average = Average(**values["loss_average"])
        # Runs that were saved before there were rewinds had none.
        rewinds = values.get("rewinds", 0)
        standing = cls(values["step"], values["processes"], average, values["metrics_sha256"], rewinds)
        kinds = [(standing.step, int), (standing.processes, int), (standing.metrics_sha256, str), (rewinds, int)]
        kinds += [(number, float) for number in asdict(average).values()]
        if wrong := [value for value, kind in kinds if type(value) is not kind]:
            raise TypeError(f"{shown(wrong[0])} is of the wrong type")
        return standing


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint of a run that is whole, if there is one, and what is wrong with those after it.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; or a newer release wrote one.
    """
    faults: list[CheckpointError] = []
    for checkpoint in reversed(_checkpoints(run_dir)):
        try:
            check_files(checkpoint, _FILES)
            return checkpoint, faults
        except VersionError:
            raise
        except CheckpointError as error:
            faults.append(error)
    if faults:
        raise CheckpointError(
            f"{faults[0]}. No checkpoint of the run is whole; to begin it anew, remove {run_dir / 'checkpoints'}"
        )
    return None, faults


def save_checkpoint(
    run_dir: Path, model: IntegratedModel, optimizer: torch.optim.Optimizer, standing: Standing, *, keep: int
) -> Path:
    """Save a run's step, then remove all but the `keep` newest checkpoints up to it.

    Those of later steps are damaged, or the run would not be here; they stay until the run is there again.

    Raises:
        OSError: the folder cannot be written.
    """
    target = checkpoint_path(run_dir, standing.step)
    if not _is_whole(target):  # a run that is stopped right after it was resumed has this one already
        shutil.rmtree(target, ignore_errors=True)
        with atomic_directory(target) as partial:
            write_config(model, partial)
            write_weights(model, partial)
            write_tensors(partial / OPTIMIZER_FILE, optimizer_tensors(model, optimizer))
            write_json(partial / STANDING_FILE, {"format_version": FORMAT_VERSION, **asdict(standing)})
            write_manifest(partial, _FILES)
    checkpoints = _checkpoints(run_dir)
    for old in checkpoints[: max(0, checkpoints.index(target) + 1 - keep)]:
        shutil.rmtree(partial_name(old), ignore_errors=True)
        old.rename(partial_name(old))  # so that no half of a checkpoint has a checkpoint's name
    for remains in target.parent.glob(partial_name(Path("*")).name):
        shutil.rmtree(remains)
    return target


def load_standing(checkpoint: Path) -> Standing:
    """Read where the run stood.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = checkpoint / STANDING_FILE
    values = read_json(path)
    check_version(path, values.get("format_version"), FORMAT_VERSION)
    try:
        return Standing.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold a run's standing: {error!r}") from error


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimiser's state.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    load_optimizer_tensors(model, optimizer, read_tensors(checkpoint / OPTIMIZER_FILE))


def _checkpoints(run_dir: Path) -> list[Path]:
    """The folders of saved steps, in order."""
    found = ((_NAME.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("step-*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_files(checkpoint, _FILES)
    except CheckpointError:
        return False
    return True
