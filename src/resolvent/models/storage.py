"""Saved models: a folder with ``config.json`` and ``model.safetensors``."""

from pathlib import Path

import torch
from torch import Tensor

from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..files import check_version, read_json, shown, write_json
from ..manifest import check_file
from ..tensors import read_tensors, write_tensors
from .base import IntegratedModel
from .phase1 import Phase1Config
from .phase2 import Phase2Config
from .phases import PHASES, Phase, phase_of

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"

_TYPE = "resolvent_phase{}"
_TYPES = {_TYPE.format(number): phase for number, phase in PHASES.items()}
_TIED = "lm_head.weight"
"""A head that is the token embedding's table has no copy of its own in the file."""


def save_model(model: IntegratedModel, directory: str | Path) -> None:
    """Write configuration and weights; each file appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_weights(model, directory)
        write_config(model, directory)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {directory}: {error}") from error


def write_config(model: IntegratedModel, directory: Path) -> None:
    """Write the configuration alone, which does not change while a model is trained."""
    model_type = _TYPE.format(phase_of(model))
    write_json(
        directory / CONFIG, {"model_type": model_type, "format_version": FORMAT_VERSION, **model.config.to_dict()}
    )


def write_weights(model: IntegratedModel, directory: Path) -> None:
    """Write the weights alone."""
    tensors = model.state_dict()
    if model.tied:
        del tensors[_TIED]
    write_tensors(directory / WEIGHTS, tensors)


def load_model(directory: str | Path, device: torch.device | str | None = None) -> IntegratedModel:
    """Read what ``save_model`` wrote, in evaluation mode, onto ``device`` (None for CUDA where there is one).

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    directory = Path(directory)
    phase, config = _read_config(directory / CONFIG)
    tensors = read_tensors(directory / WEIGHTS)
    try:
        # A few bytes of a configuration can ask for any amount of memory: it gets what the weights take.
        if fault := _misfit(phase, config, tensors):
            raise CheckpointError(f"the weights in {directory / WEIGHTS} do not fit {CONFIG}: {fault}")
        model = phase.model(config, init=False)
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    if model.tied:
        tensors[_TIED] = model.lm_head.weight  # the table is there, under its own name
    model.load_state_dict(tensors)
    device = device if device is not None else pick_device("auto")
    return model.to(device).eval()


def _read_config(path: Path) -> tuple[Phase, Phase1Config | Phase2Config]:
    """The phase and the configuration that a file describes."""
    values = read_json(path)
    check_file(path)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in _TYPES:
        known = " or ".join(_TYPES)
        raise CheckpointError(
            f"{path} does not describe a resolvent model (model_type is {shown(model_type)}, not {known})"
        )
    check_version(path, values.pop("format_version", None), FORMAT_VERSION)
    phase = _TYPES[model_type]
    try:
        config = phase.config.from_dict(values)
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return phase, config


def _misfit(phase: Phase, config: Phase1Config | Phase2Config, tensors: dict[str, Tensor]) -> str | None:
    """What keeps the tensors from being those of the model, which is made without memory for it."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if len(layers) != config.n_layers:
        return f"they are of {len(layers)} layers, not {config.n_layers}"
    try:
        with torch.device("meta"):
            model = phase.model(config, init=False)
    except RuntimeError as error:  # sizes whose product is no size
        return str(error)
    expected = model.state_dict()
    if model.tied:
        del expected[_TIED]
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is no tensor of this model"
        if tensors[name].shape != expected[name].shape:
            return f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
    return None
