"""Saved models: a folder with ``config.json`` and ``model.safetensors``."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..files import read_json, write_file, write_json
from .base import IntegratedModel
from .phases import PHASES, phase_of

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
    model_type = _TYPE.format(phase_of(model))
    description = {"model_type": model_type, "format_version": FORMAT_VERSION, **model.config.to_dict()}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    if model.tied:
        del tensors[_TIED]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_json(directory / CONFIG, description)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {directory}: {error}") from error


def load_model(directory: str | Path, device: torch.device | str | None = None) -> IntegratedModel:
    """Read what ``save_model`` wrote, in evaluation mode, onto ``device`` (None for CUDA where there is one).

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    directory = Path(directory)
    model = _read_description(directory / CONFIG)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {directory / WEIGHTS}: {error}") from error
    if model.tied:
        tensors[_TIED] = model.lm_head.weight  # the table is there, under its own name
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {directory / WEIGHTS} do not fit {CONFIG}: {error}") from error
    device = device if device is not None else pick_device("auto")
    return model.to(device).eval()


def _read_description(path: Path) -> IntegratedModel:
    """The model that a configuration file describes, without its weights."""
    values = read_json(path)
    model_type = values.pop("model_type", None)
    if model_type not in _TYPES:
        known = " or ".join(_TYPES)
        raise CheckpointError(f"{path} does not describe a resolvent model (model_type is {model_type!r}, not {known})")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION}")
    try:
        phase = _TYPES[model_type]
        return phase.model(phase.config.from_dict(values), init=False)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
