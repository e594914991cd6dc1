"""Checkpoints: everything a run needs to go on as if it had never stopped, in a folder for each saved step.

One process writes weights and optimiser state in two files; several that share the model out write a file each. The
names of the tensors are the same, and either kind of run resumes from either.
"""

import dataclasses
import hashlib
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resolvent.errors import CheckpointError, VersionError
from resolvent.files import (
    atomic_directory,
    check_version,
    discard,
    own_directory,
    partial_name,
    read_json,
    refuse_link,
    shown,
    sweep,
    write_json,
)
from resolvent.manifest import check_files, write_manifest
from resolvent.models import IntegratedModel
from resolvent.models.storage import (
    CONFIG,
    WEIGHTS,
    load_model,
    named_weights,
    read_config,
    write_config,
    write_weights,
)
from resolvent.tensors import read_tensors, write_tensors
from resolvent.training.average import Average
from resolvent.training.optimizer import load_optimizer_tensors, optimizer_tensors
from resolvent.training.sharding import (
    empty_shards,
    is_sharded,
    read_shards,
    shard_names,
    stored_shapes,
    write_shards,
)

FORMAT_VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_STATE_FILE = "trainer.json"
FOLDER = "checkpoints"
"""Holds the checkpoints of a run folder."""

_MOST_SHARDS = 99_999
"""As many as the names of their files have room for."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class TrainerState:
    """State of a trainer between two steps.

    The order of the data and dropout's randomness follow from the seed and `step`.

    Attributes:
        step: steps taken.
        processes: those that the run began with. They fix the batches of a step, however many go on with it.
        loss_average: the smoothed loss.
        metrics_sha256: of the metrics written so far.
        rewinds: times that the run went back because something was not finite.
        validation_due: whether the validation after this step was put off: the run was stopped.
    """

    step: int
    processes: int
    loss_average: Average
    metrics_sha256: str = hashlib.sha256().hexdigest()
    rewinds: int = 0
    validation_due: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainerState":
        """The inverse of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError: values that it does not give.
        """
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        average = Average(**fields.pop("loss_average"))
        state = cls(**fields, loss_average=average)
        kinds = [(state.step, int), (state.processes, int), (state.metrics_sha256, str)]
        kinds += [(state.rewinds, int), (state.validation_due, bool)]
        kinds += [(number, float) for number in asdict(average).values()]
        if wrong := [value for value, kind in kinds if type(value) is not kind]:
            raise TypeError(f"{shown(wrong[0])} is of the wrong type")
        return state


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run_dir / FOLDER / f"step-{step:08d}"


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint of a run that is whole, if there is one, and what is wrong with those after it.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; a newer release wrote one; or their folder is a link.
    """
    faults: list[CheckpointError] = []
    for checkpoint in reversed(_checkpoints(run_dir)):
        try:
            _check(checkpoint)
            return checkpoint, faults
        except VersionError:
            raise
        except CheckpointError as error:
            faults.append(error)
    if faults:
        raise CheckpointError(
            f"{faults[0]}. No checkpoint of the run is whole; to begin it anew, remove {run_dir / FOLDER}"
        )
    return None, faults


def save_checkpoint(
    run_dir: Path, model: IntegratedModel, optimizer: torch.optim.Optimizer, state: TrainerState, *, keep: int
) -> Path:
    """Save a run's step, then remove all but the `keep` newest checkpoints up to it.

    Those of later steps are damaged, or the run would not be here; they stay until the run is there again. If the model
    is sharded, all processes call this. What cannot be removed stays, which a warning says.

    Raises:
        OSError: the folder cannot be written.
        CheckpointError: the folder of the checkpoints is a link.
    """
    target = checkpoint_path(run_dir, state.step)
    refuse_link(target.parent)  # in every process: none waits for one that stops here
    if is_sharded(model):
        _save_shards(target, model, optimizer, state)
    elif not _is_whole(target):  # a run that is stopped right after it was resumed has this one already
        own_directory(target.parent)
        with atomic_directory(target) as partial:
            write_weights(named_weights(model), partial)
            write_tensors(partial / OPTIMIZER_FILE, optimizer_tensors(model, optimizer))
            _complete(partial, model, state)
    if not is_sharded(model) or dist.get_rank() == 0:
        _remove_old(target, keep)
    return target


def _save_shards(target: Path, model: IntegratedModel, optimizer: torch.optim.Optimizer, state: TrainerState) -> None:
    """Let every process write its shards. The first makes the folder, and makes a checkpoint of it in the end."""
    first = dist.get_rank() == 0
    if first:
        own_directory(target.parent)
    whole = [first and _is_whole(target)]
    dist.broadcast_object_list(whole)
    if whole[0]:
        return
    with atomic_directory(target) if first else nullcontext(partial_name(target)) as partial:
        dist.barrier()
        write_shards(partial, model, {**named_weights(model), **optimizer_tensors(model, optimizer)})
        if first:
            _complete(partial, model, state, shards=dist.get_world_size())


def _complete(partial: Path, model: IntegratedModel, state: TrainerState, **shards: int) -> None:
    write_config(model, partial)
    write_json(partial / TRAINER_STATE_FILE, {"format_version": FORMAT_VERSION, **asdict(state), **shards})
    write_manifest(partial, _files(partial))


def _remove_old(target: Path, keep: int) -> None:
    """Remove what is neither among the newest checkpoints up to one nor later, and what killed runs left."""
    checkpoints = _checkpoints(target.parent.parent)
    sweep(target.parent)
    for old in checkpoints[: max(0, checkpoints.index(target) + 1 - keep)]:
        discard(old)


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """Read where the run stood.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    values = _read_trainer_state(checkpoint)
    try:
        return TrainerState.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / TRAINER_STATE_FILE} holds no trainer state: {error!r}") from error


def load_weights(checkpoint: Path, device: torch.device, *, sharded: bool, compile: bool = False) -> IntegratedModel:
    """Make a checkpoint's model.

    Args:
        checkpoint: the checkpoint.
        device: where to; of a sharded model, this process's.
        sharded: share the model out between all processes, which all call this.
        compile: compile the blocks of a sharded model.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    if not sharded and not _shards(checkpoint):
        return load_model(checkpoint, device=device)
    phase, config = read_config(checkpoint / CONFIG)
    if sharded:
        with torch.device("meta"):
            model = phase.model(config, init=False)
        model = empty_shards(model, device, compile=compile)
    else:
        model = phase.model(config, init=False).to(device)
    read_shards(checkpoint, model, named_weights(model))
    return model


def restore_weights(checkpoint: Path, model: IntegratedModel) -> None:
    """Give a model the weights of a checkpoint of its own; where there are several processes, all call this.

    Raises:
        CheckpointError: a file is damaged.
    """
    read_shards(checkpoint, model, named_weights(model))


def load_optimizer(checkpoint: Path, model: IntegratedModel, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimiser's state; if the model is sharded, all processes call this.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    if not is_sharded(model) and not _shards(checkpoint):
        load_optimizer_tensors(model, optimizer, read_tensors(checkpoint / OPTIMIZER_FILE))
        return
    parameters = dict(model.named_parameters())
    tensors = {}
    for name in stored_shapes(checkpoint):
        parameter, slash, key = name.rpartition("/")
        if slash and parameter not in parameters:
            raise CheckpointError(f"the optimiser's state is of another model; this one lacks {parameter}")
        if slash:
            tensors[name] = torch.zeros(()) if key == "step" else torch.zeros_like(parameters[parameter].detach())
    read_shards(checkpoint, model, tensors)
    load_optimizer_tensors(model, optimizer, tensors)


def _read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    values = read_json(checkpoint / TRAINER_STATE_FILE)
    check_version(checkpoint / TRAINER_STATE_FILE, values.get("format_version"), FORMAT_VERSION)
    return values


def _shards(checkpoint: Path) -> int:
    """The number of files that weights and optimiser state are shared out to; 0 if one process wrote them."""
    shards = _read_trainer_state(checkpoint).get("shards", 0)
    if type(shards) is not int or not 0 <= shards <= _MOST_SHARDS:
        raise CheckpointError(f"{checkpoint / TRAINER_STATE_FILE} names {shown(shards)} shards: restore it from a copy")
    return shards


def _files(checkpoint: Path) -> list[str]:
    """What the manifest of a checkpoint lists."""
    shards = _shards(checkpoint)
    return [CONFIG, TRAINER_STATE_FILE, *(shard_names(shards) if shards else (WEIGHTS, OPTIMIZER_FILE))]


def _checkpoints(run_dir: Path) -> list[Path]:
    """The folders of saved steps, in order."""
    folder = run_dir / FOLDER
    refuse_link(folder)
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name)]


def _check(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        CheckpointError: a file is missing or changed, or the checkpoint is a link.
    """
    refuse_link(checkpoint)
    check_files(checkpoint, _files(checkpoint))


def _is_whole(checkpoint: Path) -> bool:
    try:
        _check(checkpoint)
    except CheckpointError:
        return False
    return True
