"""Factory of Phase 1 models: from the defaults, a preset, a configuration or single values."""

import torch

from ..factory import choose_config, to_device
from .config import Phase1Config, get_phase1_preset
from .model import Phase1IntegratedModel


def create_phase1_model(
    config: Phase1Config | None = None,
    preset: str | None = None,
    vocab_size: int | None = None,
    d_model: int | None = None,
    n_layers: int | None = None,
    n_seq: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: object,
) -> Phase1IntegratedModel:
    """Create a Phase 1 model with fresh weights.

    Weights are drawn on the CPU from torch's global generator: ``torch.manual_seed`` gives the same model everywhere.

    Args:
        config: a whole configuration; it is not changed.
        preset: a name that ``get_phase1_preset`` knows, instead of ``config``.
        vocab_size: replaces the value of the configuration, the preset or the defaults.
        d_model: likewise.
        n_layers: likewise.
        n_seq: likewise.
        device: device of the model; None for CUDA where there is one, and the CPU otherwise.
        kwargs: any other field of ``Phase1Config``.

    Raises:
        ConfigError: both ``config`` and ``preset`` are given, the preset or a field is unknown, or a value is wrong.
    """
    sizes = dict(vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_seq=n_seq)
    chosen = choose_config(Phase1Config, get_phase1_preset, config, preset, sizes, kwargs)
    return to_device(Phase1IntegratedModel(chosen), device)
