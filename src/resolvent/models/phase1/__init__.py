"""Phase 1: the model of a static Hamiltonian that Phase 2 extends."""

from .block import Phase1Block, Phase1Record
from .config import Phase1Config, get_phase1_preset
from .diagnostics import Phase1Diagnostics
from .factory import create_phase1_model
from .model import Phase1IntegratedModel
from .state import Phase1LayerState, Phase1State

__all__ = [
    "Phase1Block",
    "Phase1Config",
    "Phase1Diagnostics",
    "Phase1IntegratedModel",
    "Phase1LayerState",
    "Phase1Record",
    "Phase1State",
    "create_phase1_model",
    "get_phase1_preset",
]
