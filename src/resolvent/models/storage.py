"""Saved models: a folder with ``config.json`` and ``model.safetensors``.

Transformers reads these folders. Folders that Transformers writes are read here, too: their ``config.json`` has more
entries, the names of their weights may begin with ``model.``, and their weights may be in several files.
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..files import check_version, read_json, shown, write_json
from ..manifest import CONFIG, INDEX, WEIGHTS, read_checked
from ..tensors import TensorFile, indexed_files, write_tensors
from ..wording import JSON
from .adapters import Adapters, base_folder, has_adapters
from .base import IntegratedModel
from .config import ModelConfig, Values
from .phase1 import Phase1Config
from .phase2 import Phase2Config
from .phases import PHASES, Phase, phase_of

FORMAT_VERSION = 5
_SIDE_BY_SIDE = 5
"""First format version of Phase 2 models that this release reads."""

TRANSFORMERS_ENTRIES = (
    "architectures",
    "auto_map",
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
"""Entries of Transformers in ``config.json`` beside the fields."""

_PREFIX = "model."
_TIED, _TABLE = "lm_head.weight", "token_embedding.weight"
"""A tied head has no copy of its own in the file."""

Dtype = Literal["float32", "stored"]
"""Numbers of a model's weights: float32, or as its file has them."""


def model_type(phase: int) -> str:
    """Return the name of a phase in ``config.json``."""
    return f"resolvent_phase{phase}"


_TYPES = {model_type(number): phase for number, phase in PHASES.items()}


def save_model(model: IntegratedModel, directory: str | Path) -> None:
    """Write configuration and weights; each file appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_weights(named_weights(model), directory)
        write_config(model, directory)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {directory}: {error}") from error


def write_config(model: IntegratedModel, directory: Path) -> None:
    """Write the configuration alone, which training does not change."""
    phase = phase_of(model)
    description = {
        "architectures": [f"Phase{phase}ForCausalLM"],
        "model_type": model_type(phase),
        "format_version": FORMAT_VERSION,
        **model.config.to_dict(),
    }
    write_json(directory / CONFIG, description)


def write_weights(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Write the weights alone, as ``named_weights`` returns them."""
    write_tensors(directory / WEIGHTS, weights)


def named_weights(model: IntegratedModel) -> dict[str, Tensor]:
    """Return the weights by their names in files."""
    tensors = model.state_dict()
    if model.tied:
        del tensors[_TIED]
    return tensors


def weights_digest(model: IntegratedModel) -> str:
    """Return the SHA-256 of a model's weights, names and shapes included."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_model(
    directory: str | Path, device: torch.device | str | None = None, *, dtype: Dtype = "float32"
) -> IntegratedModel:
    """Read a model that ``save_model`` or Transformers' ``save_pretrained`` wrote, in evaluation mode.

    LoRA adapters are merged into it.

    Args:
        directory: the folder.
        device: its device; None for CUDA where there is one.
        dtype: ``float32``; or ``stored``, in which bfloat16 weights stay bfloat16, at half the memory.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    directory = Path(directory)
    if not has_adapters(directory):
        return load_base(directory, device, dtype=dtype)
    return load_base(base_folder(directory), device, Adapters.read(directory), dtype=dtype)


def load_base(
    directory: Path,
    device: torch.device | str | None = None,
    adapters: Adapters | None = None,
    *,
    dtype: Dtype = "float32",
) -> IntegratedModel:
    """Read a model as ``load_model`` does, with other adapters than those of its folder; None for none.

    Raises:
        CheckpointError: a file is missing or damaged, or weights or adapters do not fit the configuration.
    """
    phase, config = read_config(directory / CONFIG)
    with ExitStack() as stack:
        parts = [stack.enter_context(TensorFile(path)) for path in _weight_files(directory)]
        shapes = {name.removeprefix(_PREFIX): shape for part in parts for name, shape in part.shapes.items()}
        try:
            # A few bytes of a configuration can ask for any amount of memory: it gets what the weights take. And
            # weights of other shapes are not read, however large they are.
            if fault := _misfit(phase, config, shapes):
                raise CheckpointError(f"the weights in {directory} do not fit {CONFIG}: {fault}")
            model = phase.model(config, init=False)
        except ConfigError as error:
            raise CheckpointError(f"{directory / CONFIG}: {error}") from error
        tensors = {name.removeprefix(_PREFIX): x for part in parts for name, x in part.read().items()}
    if adapters is not None:
        try:
            adapters.merge(tensors)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the adapters do not fit the model in {directory}: {error}") from error
    if tied := model.tied:
        tensors[_TIED] = tensors[_TABLE]
    model.load_state_dict(tensors, assign=dtype == "stored")
    if tied:
        model.lm_head.weight = model.get_parameter(_TABLE)
    device = device if device is not None else pick_device("auto")
    return model.to(device).eval()


def _weight_files(directory: Path) -> list[Path]:
    """Return the files of a model's weights."""
    index = directory / INDEX
    return indexed_files(index) if index.exists() else [directory / WEIGHTS]


def read_config(path: Path) -> tuple[Phase, Phase1Config | Phase2Config]:
    """Return the phase and the configuration that a file describes.

    Raises:
        CheckpointError: the file is missing or damaged, or describes no model.
    """
    values = read_json(path, read_checked)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in _TYPES:
        known = " or ".join(_TYPES)
        raise CheckpointError(f"{path} does not describe a resolvent model (model_type is {shown(kind)}, not {known})")
    phase = _TYPES[kind]
    values = in_todays_format(path, values, phase.config)
    values = {name: value for name, value in values.items() if name not in TRANSFORMERS_ENTRIES}
    try:
        config = phase.config.from_dict(values)
        config.validate(JSON)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return phase, config


def in_todays_format(source: Path | str, values: Values, kind: type[ModelConfig]) -> Values:
    """Return the entries of a ``config.json`` of any format version as this release writes them, without the version.

    Args:
        source: their file, for errors.
        values: the entries, ``format_version`` among them.
        kind: class of the configuration.

    Raises:
        VersionError, CheckpointError: the version is a later one, none, or one that this release does not read.
    """
    check_version(source, values.get("format_version"), FORMAT_VERSION)
    version = values["format_version"]
    if kind is Phase2Config and version < _SIDE_BY_SIDE:
        raise CheckpointError(
            f"{source} has format version {version}, of a Phase 2 model in which BK-Core and memory follow each other; "
            "here they work side by side: train the model again, or convert its Phase 1 model again"
        )
    return {name: value for name, value in values.items() if name != "format_version"}


def _misfit(phase: Phase, config: Phase1Config | Phase2Config, shapes: dict[str, torch.Size]) -> str | None:
    """Return the reason why tensors of these shapes do not fit the model, or None; the model is made without memory."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
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
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is no tensor of this model"
        if shapes[name] != expected[name].shape:
            return f"{name} has the shape {tuple(shapes[name])}, not {tuple(expected[name].shape)}"
    return None
