"""Saved models: a folder with ``config.json`` and ``model.safetensors``."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import CheckpointError, ConfigError
from .phase2 import Phase2Config, Phase2IntegratedModel

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: Phase2IntegratedModel, directory: str | Path) -> None:
    """Write configuration and weights; each file appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    directory = Path(directory)
    description = {"model_type": "resolvent_phase2", "format_version": FORMAT_VERSION, **model.config.to_dict()}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        _write(directory / CONFIG, (json.dumps(description, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {directory}: {error}") from error


def load_model(directory: str | Path, device: torch.device | str | None = None) -> Phase2IntegratedModel:
    """Read what ``save_model`` wrote, in evaluation mode, onto ``device`` (None for CUDA where there is one).

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    directory = Path(directory)
    model = Phase2IntegratedModel(_read_config(directory / CONFIG), init=False)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {directory / WEIGHTS}: {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {directory / WEIGHTS} do not fit {CONFIG}: {error}") from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _read_config(path: Path) -> Phase2Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != "resolvent_phase2":
        raise CheckpointError(f"{path} does not describe a resolvent model (model_type is not 'resolvent_phase2')")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION}")
    try:
        config = Phase2Config.from_dict(values)
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config
