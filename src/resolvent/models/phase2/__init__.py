"""Phase 2: resolvent and dissipative memory."""

from .config import Phase2Config, get_phase2_preset
from .factory import create_phase2_model
from .model import Phase2Block, Phase2IntegratedModel
from .state import LayerState, Phase2State

__all__ = [
    "LayerState",
    "Phase2Block",
    "Phase2Config",
    "Phase2IntegratedModel",
    "Phase2State",
    "create_phase2_model",
    "get_phase2_preset",
]
