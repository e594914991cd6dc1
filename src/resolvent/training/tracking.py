"""Trackers: metrics of a run for TensorBoard, Weights & Biases and the other trackers of Accelerate."""

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
"""Files and folders that trackers write into the run folder."""
_ID = re.compile("[0-9a-f]{32}")


class Tracking:
    """Tracking of a run within a `with` block; with the tracker `none`, it does nothing.

    A resumed run continues its entry in TensorBoard, where values after its checkpoint are dropped, and in Weights &
    Biases. In other trackers it becomes a new entry, without distributions. Only TensorBoard can drop values: after a
    rewind, other trackers skip the steps that were logged before.

    Args:
        accelerator: accelerator of the run, made with `tracker_options`.
        config: configuration of the run.
        step: number of steps before this process.
        probe: tokens that the model reads for its diagnostics, int64 (N,).
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
            text = "\n".join(f"    {name}: {value}" for name, value in settings.items())  # four blanks: preformatted
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
        """Log values of a step."""
        if self._name != "none":
            self._tell(step, {f"{group}/{name}": value for name, value in values.items()})

    def go_back(self, step: int, rewinds: int) -> None:
        """Log a rewind to a step, with the number of rewinds; call it in every process."""
        if self._name == "none":
            return
        if self._name == "tensorboard":
            # The same file: TensorBoard reads files by name, which within a second is not the order of writing.
            from tensorboard.compat.proto import event_pb2

            events: Any = event_pb2  # made on import: the type checker sees no classes
            begins = events.SessionLog(status=events.SessionLog.START)  # drops values beyond the step
            restart = events.Event(step=step + 1, session_log=begins)
            self._writes(lambda writer: writer.file_writer.add_event(restart))
            self._told = step
        self._tell(max(step + 1, self._told), {"training/rewinds": rewinds})

    def log_gradients(self, step: int, model: IntegratedModel) -> None:
        """Log the norms of the gradients in the parameters; call it in every process."""
        if self._name != "none":
            self._tell(step, gradient_norms(model))

    def log_diagnostics(self, step: int, model: IntegratedModel) -> None:
        """Log the diagnostics of the model on the probe; call it in every process."""
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
        """Log values, except those of a step before the last logged one."""
        if step >= self._told:
            self._told = step
            self._accelerator.log(values, step=step)

    def _writes(self, write: Any) -> None:
        """Call a function with TensorBoard's writer, which only the first process has."""
        if self._accelerator.is_main_process:
            write(self._accelerator.get_tracker(self._name, unwrap=True))

    def _same_run(self) -> dict[str, Any]:
        """Return options that make Weights & Biases continue an entry: its id, which the run folder keeps."""
        path = self._config.run_dir / ID_FILE
        if self._accelerator.is_main_process and not os.path.lexists(path):
            write_json(path, {"id": uuid.uuid4().hex})
        self._accelerator.wait_for_everyone()
        identity = read_json(path, partial(read_bytes, follow_links=False)).get("id")
        if not isinstance(identity, str) or not _ID.fullmatch(identity):
            raise CheckpointError(f"{path} holds no id: remove it to begin a new entry in the tracker")
        return {"id": identity, "resume": "allow", "name": self._config.run_dir.name, "dir": str(self._config.run_dir)}


def tracker_options(config: TrainingConfig) -> dict[str, Any]:
    """Return the options of an Accelerator for the tracker of a run.

    Raises:
        ConfigError: the tracker's package is not installed, which Accelerate would ignore.
    """
    if config.tracker == "none":
        return {}
    if config.tracker not in map(str, get_available_trackers()):
        package = "'resolvent[tensorboard]'" if config.tracker == "tensorboard" else config.tracker.replace("_", "-")
        raise ConfigError(f"the tracker {config.tracker} is not installed: pip install {package}")
    return {"log_with": config.tracker, "project_dir": config.run_dir}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return plain values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat
