"""Phase 2: resolvent and dissipative memory."""

from .config import Phase2Config, get_phase2_preset
from .conversion import ConversionReport, ConvertedTensor, convert_phase1_to_phase2
from .factory import create_phase2_model
from .model import Phase2Block, Phase2IntegratedModel
from .state import LayerState, Phase2State

__all__ = [
    "ConversionReport",
    "ConvertedTensor",
    "LayerState",
    "Phase2Block",
    "Phase2Config",
    "Phase2IntegratedModel",
    "Phase2State",
    "convert_phase1_to_phase2",
    "create_phase2_model",
    "get_phase2_preset",
]
