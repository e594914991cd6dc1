"""Saved models: a folder with ``config.json`` and ``model.safetensors``.

Transformers reads these folders and writes its own, which are read here: its ``config.json`` has entries of its own
beside ours, its names of weights may begin with the attribute that holds our model, and its weights may lie in several
files.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..files import read_json, write_file, write_json
from .base import IntegratedModel
from .phases import PHASES, phase_of

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Names the file of every weight, where there are several files."""

TRANSFORMERS_ENTRIES = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "output_attentions",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""What Transformers keeps in ``config.json`` beside our fields."""

_PREFIX = "model."
_TIED = "lm_head.weight"
"""A head that is the token embedding's table has no copy of its own in the file."""


def model_type(phase: int) -> str:
    """The name of a phase in ``config.json``."""
    return f"resolvent_phase{phase}"


_TYPES = {model_type(number): phase for number, phase in PHASES.items()}


def save_model(model: IntegratedModel, directory: str | Path) -> None:
    """Write configuration and weights; each file appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    directory = Path(directory)
    phase = phase_of(model)
    description = {
        "architectures": [f"Phase{phase}ForCausalLM"],
        "model_type": model_type(phase),
        "format_version": FORMAT_VERSION,
        **model.config.to_dict(),
    }
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
    """Read what ``save_model`` or Transformers' ``save_pretrained`` wrote, in evaluation mode, onto ``device`` (None
    for CUDA where there is one).

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    directory = Path(directory)
    model = _read_description(directory / CONFIG)
    tensors = {name.removeprefix(_PREFIX): x for path in _weight_files(directory) for name, x in _read(path).items()}
    if model.tied:
        tensors[_TIED] = model.lm_head.weight  # the table is there, under its own name
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {directory} do not fit {CONFIG}: {error}") from error
    device = device if device is not None else pick_device("auto")
    return model.to(device).eval()


def check_version(version: object, origin: object) -> None:
    """Raise a CheckpointError where a format is not the one that this release reads."""
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{origin} has format version {version!r}; this release reads version {FORMAT_VERSION}")


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights."""
    path = directory / INDEX
    if not path.exists():
        return [directory / WEIGHTS]
    places = read_json(path).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange or not names:
        raise CheckpointError(f"{path} must name files beside it in weight_map, got {strange or places!r}")
    return [directory / name for name in sorted(names)]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _read_description(path: Path) -> IntegratedModel:
    """The model that a configuration file describes, without its weights."""
    values = read_json(path)
    kind = values.pop("model_type", None)
    if kind not in _TYPES:
        known = " or ".join(_TYPES)
        raise CheckpointError(f"{path} does not describe a resolvent model (model_type is {kind!r}, not {known})")
    check_version(values.pop("format_version", None), path)
    values = {name: value for name, value in values.items() if name not in TRANSFORMERS_ENTRIES}
    try:
        phase = _TYPES[kind]
        return phase.model(phase.config.from_dict(values), init=False)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
