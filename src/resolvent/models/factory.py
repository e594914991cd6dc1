"""Shared part of the factories: a model from a configuration, a preset or single values."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from ..device import pick_device
from ..errors import ConfigError
from .base import IntegratedModel
from .config import ModelConfig, check_fields

_log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=ModelConfig)
Model = TypeVar("Model", bound=IntegratedModel)


def choose_config(
    kind: type[Config],
    get_preset: Callable[[str], Config],
    config: Config | None,
    preset: str | None,
    sizes: Mapping[str, int | None],
    others: Mapping[str, object],
) -> Config:
    """Return a copy of the configuration, the preset or the defaults, with other values in some fields.

    Args:
        kind: class of the configuration.
        get_preset: returns the preset of a name.
        config: a whole configuration; it is not changed.
        preset: name of a preset, instead of ``config``.
        sizes: values that replace those of the configuration unless they are None.
        others: values of any other fields.

    Raises:
        ConfigError: both ``config`` and ``preset`` are given, ``config`` is of another kind, or a preset or a field
            does not exist.
    """
    if config is not None and preset is not None:
        raise ConfigError(f"give either config or preset, not both (preset={preset!r})")
    if config is not None and not isinstance(config, kind):
        raise ConfigError(
            f"config must be a {kind.__name__}, got {config!r}; presets and fields go by name (preset=...)"
        )
    base = config if config is not None else get_preset(preset) if preset is not None else kind()
    replaced = {name: value for name, value in sizes.items() if value is not None} | dict(others)
    check_fields(kind, replaced)
    return dataclasses.replace(base, **replaced)


def to_device(model: Model, device: torch.device | str | None) -> Model:
    """Move a model to ``device``; None for CUDA where there is one, and the CPU otherwise."""
    device = device if device is not None else pick_device("auto")
    _log.info("created %s with %s parameters on %s", type(model).__name__, f"{model.num_parameters():,}", device)
    return model.to(device)
