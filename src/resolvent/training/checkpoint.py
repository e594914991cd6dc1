"""Checkpoints: one folder per saved step, from which a run resumes exactly.

One process writes weights and optimiser state to two files; the processes of a sharded run write one file each. The
names of the tensors are the same, and runs of both kinds resume from both.
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
    remove,
    shown,
    sweep,
    write_json,
)
from resolvent.manifest import check_files, write_manifest
from resolvent.models import IntegratedModel
from resolvent.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_folder
from resolvent.models.storage import (
    CONFIG,
    WEIGHTS,
    load_base,
    load_model,
    named_weights,
    read_config,
    write_config,
    write_weights,
)
from resolvent.runs import EMA_FOLDER
from resolvent.tensors import read_tensors, write_tensors
from resolvent.training.average import Average
from resolvent.training.ema import WeightAverage, is_average
from resolvent.training.lora import LoraOptions, add_adapters, is_adapted, load_adapters, write_adapters
from resolvent.training.optimizer import load_optimizer_tensors, optimizer_tensors
from resolvent.training.sharding import (
    empty_shards,
    is_sharded,
    read_shards,
    shard_names,
    stored_shapes,
    whole_weights,
    write_shards,
)

FORMAT_VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
TRAINER_STATE_FILE = "trainer.json"
FOLDER = "checkpoints"
"""Folder of the checkpoints in a run folder."""

_MOST_SHARDS = 99_999
"""Largest number of shards that fits the names of their files."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class TrainerState:
    """State of a trainer between two steps.

    The order of the data and dropout's randomness follow from the seed and `step`.

    Attributes:
        step: number of steps taken.
        processes: number of processes at the start of the run. It fixes the batches of a step, also for a resumed run.
        loss_average: the smoothed loss.
        metrics_sha256: SHA-256 of the metrics written so far.
        rewinds: number of times that the run went back after a value that is not finite.
        validation_due: whether the run stopped before the validation of this step.
    """

    step: int
    processes: int
    loss_average: Average
    metrics_sha256: str = hashlib.sha256().hexdigest()
    rewinds: int = 0
    validation_due: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainerState":
        """Return the state that `dataclasses.asdict` described.

        Raises:
            KeyError, TypeError: a value is missing or has another type.
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
    """Return the folder of a step's checkpoint."""
    return run_dir / FOLDER / f"step-{step:08d}"


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[CheckpointError]]:
    """Return the newest whole checkpoint of a run, if there is one, and the faults of later ones.

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
    run_dir: Path,
    model: IntegratedModel,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    *,
    average: WeightAverage | None = None,
    keep: int,
    keep_step: int | None = None,
) -> Path:
    """Save a checkpoint of a step, then remove all but the `keep` newest ones up to it and that of `keep_step`.

    Checkpoints of later steps are damaged, since the run went back before them; they stay until the run reaches their
    steps again. If the model is sharded, all processes call this. A warning is logged for what cannot be removed.

    Raises:
        OSError: the folder cannot be written.
        CheckpointError: the folder of the checkpoints is a link.
    """
    target = checkpoint_path(run_dir, state.step)
    refuse_link(target.parent)  # in every process, so that all stop here
    if is_sharded(model):
        _save_shards(target, model, optimizer, state, average)
    elif not _is_whole(target):  # a run that stops right after resuming has it already
        own_directory(target.parent)
        with atomic_directory(target) as partial:
            _write_weights(model, partial)
            write_tensors(partial / OPTIMIZER_FILE, optimizer_tensors(model, optimizer))
            if average is not None:
                write_tensors(partial / EMA_FILE, average.tensors)
            _complete(partial, model, state, ema=average is not None, adapters=is_adapted(model))
    if not is_sharded(model) or dist.get_rank() == 0:
        _remove_old(target, keep, keep_step)
    return target


def _save_shards(
    target: Path,
    model: IntegratedModel,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    average: WeightAverage | None,
) -> None:
    """Write the shards of every process; the first process makes the folder and completes the checkpoint."""
    first = dist.get_rank() == 0
    if first:
        own_directory(target.parent)
    whole = [first and _is_whole(target)]
    dist.broadcast_object_list(whole)
    if whole[0]:
        return
    with atomic_directory(target) if first else nullcontext(partial_name(target)) as partial:
        dist.barrier()
        averages = {} if average is None else average.tensors
        write_shards(partial, model, {**named_weights(model), **optimizer_tensors(model, optimizer), **averages})
        if first:
            _complete(partial, model, state, shards=dist.get_world_size())


def _complete(partial: Path, model: IntegratedModel, state: TrainerState, **files: int) -> None:
    write_config(model, partial)
    write_json(partial / TRAINER_STATE_FILE, {"format_version": FORMAT_VERSION, **asdict(state), **files})
    write_manifest(partial, _files(partial))


def _remove_old(target: Path, keep: int, keep_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints up to the target, and remains of killed runs; later ones stay."""
    run_dir = target.parent.parent
    checkpoints, pinned = _checkpoints(run_dir), None if keep_step is None else checkpoint_path(run_dir, keep_step)
    sweep(target.parent)
    for old in checkpoints[: max(0, checkpoints.index(target) + 1 - keep)]:
        if old != pinned:
            discard(old)


def checkpoint_of(run_dir: Path, step: int) -> Path | None:
    """Return the checkpoint of a step; None if there is none that is whole."""
    checkpoint = checkpoint_path(run_dir, step)
    return checkpoint if _is_whole(checkpoint) else None


def remove_later(run_dir: Path, checkpoint: Path) -> None:
    """Remove the checkpoints after another, the newest first, so that a run goes on from that one.

    Raises:
        OSError: one cannot be removed.
    """
    checkpoints = _checkpoints(run_dir)
    for later in reversed(checkpoints[checkpoints.index(checkpoint) + 1 :]):
        remove(later)


def write_models(run_dir: Path, model: IntegratedModel, average: WeightAverage | None) -> None:
    """Write the weights into a run folder, and their moving average as a model of its own into a folder there.

    If the model is sharded, all processes call this.

    Raises:
        OSError: the folder cannot be written.
        CheckpointError: the folder of the average is a link.
    """
    _write_model(model, run_dir)
    if average is None:
        return
    folder = run_dir / EMA_FOLDER
    if not is_sharded(model) or dist.get_rank() == 0:
        write_config(model, own_directory(folder))
    with average.in_place():
        _write_model(model, folder)


def _write_model(model: IntegratedModel, folder: Path) -> None:
    if not is_sharded(model):
        _write_weights(model, folder)
        return
    weights = whole_weights(model)
    if dist.get_rank() == 0:
        write_weights(weights, folder)


def _write_weights(model: IntegratedModel, folder: Path) -> None:
    """Write the weights of a model that is not sharded; of one with adapters, those alone."""
    if is_adapted(model):
        write_adapters(model, folder)
    else:
        write_weights(named_weights(model), folder)


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """Read the state of the trainer.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    values = _read_trainer_state(checkpoint)
    try:
        return TrainerState.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / TRAINER_STATE_FILE} holds no trainer state: {error!r}") from error


def load_weights(
    checkpoint: Path,
    device: torch.device,
    *,
    sharded: bool,
    lora: LoraOptions | None = None,
) -> IntegratedModel:
    """Return the model of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        device: device of the model; of a sharded model, the device of this process.
        sharded: shard the model over all processes, which all call this.
        lora: adapters of the run, if it has some; the other weights are in the run folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    if lora is not None:
        model = load_base(base_folder(checkpoint), "cpu")
        add_adapters(model, lora)
        load_adapters(model, checkpoint)
        return model.to(device)
    if not sharded and not _shards(checkpoint):
        return load_model(checkpoint, device=device)
    phase, config = read_config(checkpoint / CONFIG)
    if sharded:
        with torch.device("meta"):
            model = phase.model(config, init=False)
        model = empty_shards(model, device)
    else:
        model = phase.model(config, init=False).to(device)
    read_shards(checkpoint, model, named_weights(model))
    return model


def restore_weights(checkpoint: Path, model: IntegratedModel) -> None:
    """Load the weights of a checkpoint of the same run into its model; all processes call this.

    Raises:
        CheckpointError: a file is damaged.
    """
    if is_adapted(model):
        load_adapters(model, checkpoint)
    else:
        read_shards(checkpoint, model, named_weights(model))


def load_average(checkpoint: Path, model: IntegratedModel, average: WeightAverage) -> None:
    """Give an average the values that a checkpoint has; if the model is sharded, all processes call this.

    Raises:
        CheckpointError: the file is damaged, or there is none.
    """
    read_shards(checkpoint, model, average.tensors)


def load_optimizer(checkpoint: Path, model: IntegratedModel, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser state; if the model is sharded, all processes call this.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    if not is_sharded(model) and not _shards(checkpoint):
        load_optimizer_tensors(model, optimizer, read_tensors(checkpoint / OPTIMIZER_FILE))
        return
    parameters = dict(model.named_parameters())
    tensors = {}
    for name in stored_shapes(checkpoint):
        if is_average(name):
            continue
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
    """Return the number of files with shards; 0 if one process wrote the checkpoint."""
    shards = _read_trainer_state(checkpoint).get("shards", 0)
    if type(shards) is not int or not 0 <= shards <= _MOST_SHARDS:
        raise CheckpointError(f"{checkpoint / TRAINER_STATE_FILE} names {shown(shards)} shards: restore it from a copy")
    return shards


def _files(checkpoint: Path) -> list[str]:
    """Return the names of the files that the manifest of a checkpoint lists."""
    if shards := _shards(checkpoint):
        return [CONFIG, TRAINER_STATE_FILE, *shard_names(shards)]
    state = _read_trainer_state(checkpoint)
    weights = [ADAPTER_CONFIG, ADAPTER_WEIGHTS] if state.get("adapters") else [WEIGHTS]
    return [CONFIG, TRAINER_STATE_FILE, *weights, OPTIMIZER_FILE, *([EMA_FILE] if state.get("ema") else [])]


def _checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of saved steps, in order."""
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
