"""Factory of Phase 2 models: from the defaults, a preset, a configuration or single values, or by conversion."""

import torch

from ..factory import choose_config, to_device
from .config import Phase2Config, get_phase2_preset
from .conversion import convert_phase1_to_phase2
from .model import Phase2IntegratedModel

__all__ = ["Phase2Config", "convert_phase1_to_phase2", "create_phase2_model", "get_phase2_preset"]


def create_phase2_model(
    config: Phase2Config | None = None,
    preset: str | None = None,
    vocab_size: int | None = None,
    d_model: int | None = None,
    n_layers: int | None = None,
    n_seq: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: object,
) -> Phase2IntegratedModel:
    """Create a Phase 2 model with fresh weights.

    Weights are drawn on the CPU from torch's global generator: ``torch.manual_seed`` gives the same model everywhere.

    Args:
        config: a whole configuration; it is not changed.
        preset: ``tiny``, ``small``, ``base`` or ``large``, instead of ``config``.
        vocab_size: replaces the value of the configuration, the preset or the defaults.
        d_model: likewise.
        n_layers: likewise.
        n_seq: likewise.
        device: device of the model; None for CUDA where there is one, and the CPU otherwise.
        kwargs: any other field of ``Phase2Config``.

    Raises:
        ConfigError: both ``config`` and ``preset`` are given, the preset or a field is unknown, or a value is wrong.
    """
    sizes = dict(vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_seq=n_seq)
    chosen = choose_config(Phase2Config, get_phase2_preset, config, preset, sizes, kwargs)
    return to_device(Phase2IntegratedModel(chosen), device)
