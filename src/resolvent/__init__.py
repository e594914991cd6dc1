"""Linear-time language models built on the resolvent of a Hamiltonian and a dissipative Hebbian memory."""

from ._version import __version__
from .errors import CheckpointError, ConfigError, DataError, ResolventError
from .models import load_model, save_model
from .models.phase1 import Phase1Config
from .models.phase2 import (
    Phase2Config,
    Phase2IntegratedModel,
    Phase2State,
    create_phase2_model,
    get_phase2_preset,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Phase1Config",
    "Phase2Config",
    "Phase2IntegratedModel",
    "Phase2State",
    "ResolventError",
    "__version__",
    "create_phase2_model",
    "get_phase2_preset",
    "load_model",
    "save_model",
]
