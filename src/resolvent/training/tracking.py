"""Trackers: a run's numbers for TensorBoard, Weights & Biases and the others that Accelerate knows."""

import json
import os
import re
import uuid
from functools import partial
from typing import Any, Self

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import read_bytes, read_json, refuse_link, write_json
from resolvent.models import IntegratedModel
from resolvent.training.config import TrainingConfig
from resolvent.training.diagnostics import gradient_norms, read_diagnostics

PROJECT = "resolvent"
TENSORBOARD_DIR = "tensorboard"
ID_FILE = "tracker.json"

_FOLDERS = {"tensorboard": TENSORBOARD_DIR, "wandb": "wandb", "aim": ".aim"}
"""What trackers make in the run folder."""
_ID = re.compile("[0-9a-f]{32}")


class Tracking:
    """Hands a run's numbers on within a `with` block; with the tracker `none`, it does nothing.

    A resumed run goes on with what it tracked before in TensorBoard, where what lies beyond its checkpoint is dropped,
    and in Weights & Biases. In the others it becomes a new entry, and they get no distributions. Trackers other than
    TensorBoard cannot drop what they were told: a run that goes back tells them nothing until it is where it was.

    Args:
        accelerator: of the run; it knows the tracker, see `tracker_options`.
        config: the run.
        step: the steps taken before.
        probe: tokens that the model reads when it is looked into, int64 (N,).
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, step: int, probe: Tensor) -> None:
        self._accelerator, self._config, self._step, self._probe = accelerator, config, step, probe
        self._name = config.tracker
        self._told = step

    def __enter__(self) -> Self:
        if self._name == "none":
            return self
        if self._name in _FOLDERS:
            refuse_link(self._config.run_dir / _FOLDERS[self._name])
        settings = _flat(self._config.to_dict())
        if self._name == "tensorboard":
            options = {self._name: {"purge_step": self._step + 1}}
            self._accelerator.init_trackers(TENSORBOARD_DIR, init_kwargs=options)
            text = "\n".join(f"    {name}: {value}" for name, value in settings.items())  # four blanks: as it is
            self._writes(lambda writer: writer.add_text("configuration", text, self._step))
        else:
            options = {self._name: self._same_run()} if self._name == "wandb" else {}
            self._accelerator.init_trackers(PROJECT, config=settings, init_kwargs=options)
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []

    def log(self, step: int, group: str, values: dict[str, float]) -> None:
        """Hand on some numbers of a step."""
        if self._name != "none":
            self._tell(step, {f"{group}/{name}": value for name, value in values.items()})

    def go_back(self, step: int, rewinds: int) -> None:
        """Hand on that the run went back to a step, and how often it has; call it in every process."""
        if self._name == "none":
            return
        if self._name == "tensorboard":
            # In the same file: TensorBoard reads files in order of name, which within a second is not that of writing.
            from tensorboard.compat.proto import event_pb2

            events: Any = event_pb2  # whose classes are made on import: the type checker sees none
            begins = events.SessionLog(status=events.SessionLog.START)  # drops what lies beyond
            restart = events.Event(step=step + 1, session_log=begins)
            self._writes(lambda writer: writer.file_writer.add_event(restart))
            self._told = step
        self._tell(max(step + 1, self._told), {"training/rewinds": rewinds})

    def log_gradients(self, step: int, model: IntegratedModel) -> None:
        """Hand on the norms of the gradients that the model's parameters hold; call it in every process."""
        if self._name != "none":
            self._tell(step, gradient_norms(model))

    def log_diagnostics(self, step: int, model: IntegratedModel) -> None:
        """Let the model read the probe, and track its diagnostics; call it in every process."""
        if self._name == "none":
            return
        diagnostics = read_diagnostics(model, self._probe.to(self._accelerator.device))
        self._tell(step, diagnostics.scalars)
        histograms = {name: values.float().flatten().cpu() for name, values in diagnostics.histograms.items()}
        if self._name == "tensorboard":
            for name, values in histograms.items():
                self._writes(lambda writer, name=name, values=values: writer.add_histogram(name, values, step))
        elif self._name == "wandb" and self._accelerator.is_main_process:
            import wandb

            self._tell(step, {name: wandb.Histogram(values.numpy()) for name, values in histograms.items()})

    def _tell(self, step: int, values: dict[str, Any]) -> None:
        """Hand values on, but for a step before the last one that the tracker was told of."""
        if step >= self._told:
            self._told = step
            self._accelerator.log(values, step=step)

    def _writes(self, write: Any) -> None:
        """Use TensorBoard's writer, which the first process alone has."""
        if self._accelerator.is_main_process:
            write(self._accelerator.get_tracker(self._name, unwrap=True))

    def _same_run(self) -> dict[str, Any]:
        """What makes Weights & Biases go on with a run that it knows: an identity that the run folder keeps."""
        path = self._config.run_dir / ID_FILE
        if self._accelerator.is_main_process and not os.path.lexists(path):
            write_json(path, {"id": uuid.uuid4().hex})
        self._accelerator.wait_for_everyone()
        identity = read_json(path, partial(read_bytes, follow_links=False)).get("id")
        if not isinstance(identity, str) or not _ID.fullmatch(identity):
            raise CheckpointError(f"{path} holds no id: remove it to begin a new entry in the tracker")
        return {"id": identity, "resume": "allow", "name": self._config.run_dir.name, "dir": str(self._config.run_dir)}


def tracker_options(config: TrainingConfig) -> dict[str, Any]:
    """What an Accelerator must be told of the run's tracker.

    Raises:
        ConfigError: the tracker's package is not installed, which Accelerate would pass over.
    """
    if config.tracker == "none":
        return {}
    if config.tracker not in map(str, get_available_trackers()):
        package = "'resolvent[tensorboard]'" if config.tracker == "tensorboard" else config.tracker.replace("_", "-")
        raise ConfigError(f"the tracker {config.tracker} is not installed: pip install {package}")
    return {"log_with": config.tracker, "project_dir": config.run_dir}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat
