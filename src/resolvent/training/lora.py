"""LoRA: a saved model stays as it is, and low-rank adapters of its linear maps are trained.

PEFT puts the adapters into the model. The run folder holds the model's weights, written once, and the adapters in
PEFT's files; a checkpoint holds the adapters alone.

Imports of torch and PEFT are inside the functions, so that the command line can check its options without them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from resolvent.models import IntegratedModel

_NAME = "default"
"""PEFT's name of the only adapter."""
_PART = ".lora_"
"""Part of the names of adapters' parameters."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of adapters.

    Attributes:
        r: rank of the adapters.
        alpha: their products are multiplied by alpha / r.
        dropout: probability with which an element of an adapter's input is dropped in training.
        targets: ends of the names of linear maps in blocks; empty for all whose shorter side is above r.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the options of a text such as `r=16,alpha=32,dropout=0.05,targets=qkv_proj,out_proj`.

        Raises:
            ConfigError: a name or value that there is not; a text without r.
        """
        values = _named_values(text)
        if unknown := values.keys() - {"r", "alpha", "dropout", "targets"}:
            raise ConfigError(f"lora has no {min(unknown)}; it has r, alpha, dropout and targets")
        if "r" not in values:
            raise ConfigError(f"lora needs a rank, as in r=16, got {shown(text)}")
        rank = _number("r", values["r"][0])
        if rank != int(rank) or rank < 1:
            raise ConfigError(f"lora: r must be an integer >= 1, got {values['r'][0]}")
        alpha = _number("alpha", values.get("alpha", [str(2 * rank)])[0])
        dropout = _number("dropout", values.get("dropout", ["0"])[0])
        if alpha <= 0:
            raise ConfigError(f"lora: alpha must be > 0, got {alpha:g}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"lora: dropout must be >= 0 and < 1, got {dropout:g}")
        targets = tuple(values.get("targets", []))
        if "" in targets:
            raise ConfigError(f"lora: targets must name linear maps, got {shown(text)}")
        return cls(r=int(rank), alpha=alpha, dropout=dropout, targets=targets)


def _named_values(text: str) -> dict[str, list[str]]:
    """Return the values of a text by name; `targets` alone has several.

    Raises:
        ConfigError: a name stands there twice, or something that is neither a value of a name nor a target.
    """
    values: dict[str, list[str]] = {}
    name = ""
    for part in text.split(","):
        key, equals, value = (x.strip() for x in part.partition("="))
        if equals:
            if key in values:
                raise ConfigError(f"lora gives {key} twice: {shown(text)}")
            name, values[key] = key, [value]
        elif name == "targets" and key:
            values[name].append(key)
        else:
            raise ConfigError(f"lora must be r=RANK[,alpha=A][,dropout=P][,targets=NAME,...], got {shown(text)}")
    return values


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"lora: {name} must be a number, got {shown(text)}")
    return value


def is_adapted(model: "nn.Module") -> bool:
    """Return True if a model has adapters."""
    return hasattr(model, "peft_config")


def is_adapter(name: str) -> bool:
    """Return True for the name of a parameter that belongs to an adapter."""
    return _PART in name


def add_adapters(model: "IntegratedModel", options: LoraOptions) -> None:
    """Put fresh adapters into a model, in place, and freeze all other parameters.

    The adapters add nothing yet. Their matrices are drawn from torch's generator.

    Raises:
        ConfigError: PEFT is not installed, or a target fits no linear map.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=_targets(model, options),
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, model, _NAME)


def _targets(model: "IntegratedModel", options: LoraOptions) -> list[str]:
    """Return the whole names of the linear maps to adapt."""
    from torch import nn

    maps = {f"blocks.{name}": layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}
    if not options.targets:
        chosen = [name for name, layer in maps.items() if min(layer.weight.shape) > options.r]
        if not chosen:
            widest = max(min(layer.weight.shape) for layer in maps.values())
            raise ConfigError(f"lora: r must be below {widest}, the shorter side of a map: {options.r}")
        return chosen
    ends = sorted({name.split(".", 2)[2] for name in maps})
    for target in options.targets:
        if not any(f".{name}".endswith(f".{target}") for name in maps):
            raise ConfigError(
                f"lora: no linear map of the blocks ends with {shown(target)}; there are {', '.join(ends)}"
            )
    chosen = [name for name in maps if any(f".{name}".endswith(f".{target}") for target in options.targets)]
    narrow = min(chosen, key=lambda name: min(maps[name].weight.shape))
    if options.r > (side := min(maps[narrow].weight.shape)):
        raise ConfigError(f"lora: r must be at most {side}, the shorter side of {narrow}, got {shown(options.r)}")
    return chosen


def adapter_tensors(model: "nn.Module") -> "dict[str, Tensor]":
    """Return the parameters of the adapters by the names of PEFT's file."""
    from resolvent.models.adapters import PREFIX

    return {PREFIX + name: x for name, x in _named(model)}


def write_adapters(model: Any, folder: Path) -> None:
    """Write the adapters of a model into a folder, as PEFT does.

    Raises:
        OSError: the folder cannot be written.
    """
    from resolvent.files import write_json
    from resolvent.manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS
    from resolvent.tensors import write_tensors

    settings = model.peft_config[_NAME].to_dict() | {"inference_mode": True}
    write_json(folder / ADAPTER_CONFIG, {name: _plain(settings[name]) for name in sorted(settings)})
    write_tensors(folder / ADAPTER_WEIGHTS, adapter_tensors(model))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def load_adapters(model: "nn.Module", folder: Path) -> None:
    """Give the adapters of a model the values in a folder.

    Raises:
        CheckpointError: a file is missing or damaged, or of other adapters.
    """
    import torch

    from resolvent.models.adapters import ADAPTER_WEIGHTS, Adapters

    stored, own = Adapters.read(folder).tensors, dict(_named(model))
    if [(name, x.shape) for name, x in sorted(stored.items())] != [(name, x.shape) for name, x in sorted(own.items())]:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} holds other adapters than the run has")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def _named(model: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
    """Yield the parameters of the adapters with their names in the model."""
    named = ((name, x) for name, x in model.named_parameters() if is_adapter(name))
    return ((name.replace(f".{_NAME}.", "."), x.detach()) for name, x in named)


def base_weights(model: "IntegratedModel") -> "dict[str, Tensor]":
    """Return the weights of the model without its adapters, by their names in files."""
    from resolvent.models.storage import named_weights

    return {name.replace(".base_layer.", "."): x for name, x in named_weights(model).items() if not is_adapter(name)}


def whole_model(model: "IntegratedModel") -> "IntegratedModel":
    """Add the adapters of a model, if it has some, to its weights, in place; return the model."""
    if not is_adapted(model):
        return model
    from peft.tuners.lora import LoraLayer

    adapted = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError("--lora needs PEFT: pip install 'resolvent[lora]'") from error
    return peft
