"""Linear-time language models built on the resolvent of a Hamiltonian and a dissipative Hebbian memory."""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__
from .errors import CheckpointError, ConfigError, DataError, ResolventError

if TYPE_CHECKING:
    from .models import load_model, save_model
    from .models.phase1 import (
        Phase1Config,
        Phase1IntegratedModel,
        Phase1State,
        create_phase1_model,
        get_phase1_preset,
    )
    from .models.phase2 import (
        ConversionReport,
        Phase2Config,
        Phase2IntegratedModel,
        Phase2State,
        convert_phase1_to_phase2,
        convert_transformer,
        create_phase2_model,
        get_phase2_preset,
        transformer_config,
    )

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionReport",
    "DataError",
    "Phase1Config",
    "Phase1IntegratedModel",
    "Phase1State",
    "Phase2Config",
    "Phase2IntegratedModel",
    "Phase2State",
    "ResolventError",
    "__version__",
    "convert_phase1_to_phase2",
    "convert_transformer",
    "create_phase1_model",
    "create_phase2_model",
    "get_phase1_preset",
    "get_phase2_preset",
    "load_model",
    "save_model",
    "transformer_config",
]

_PHASE1 = ("Phase1Config", "Phase1IntegratedModel", "Phase1State", "create_phase1_model", "get_phase1_preset")
_HOMES = {"load_model": "models", "save_model": "models", **dict.fromkeys(_PHASE1, "models.phase1")}


def __getattr__(name: str) -> object:
    # Loading torch takes a second, which `resolvent --help` need not wait for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'models.phase2')}"), name)


def __dir__() -> list[str]:
    return __all__
