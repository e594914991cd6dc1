"""Phase 2: resolvent and dissipative memory."""

from .block import Phase2Block, Phase2Record
from .config import Phase2Config, RotaryScaling, get_phase2_preset
from .conversion import convert_phase1_to_phase2
from .conversion_report import ConversionReport, ConvertedTensor
from .diagnostics import Phase2Diagnostics
from .factory import create_phase2_model
from .model import Phase2IntegratedModel
from .state import LayerState, Phase2State
from .transformer import convert_transformer, match_readouts, transformer_config
from .transformer_target import save_transformer

__all__ = [
    "ConversionReport",
    "ConvertedTensor",
    "LayerState",
    "Phase2Block",
    "Phase2Config",
    "Phase2Diagnostics",
    "Phase2IntegratedModel",
    "Phase2Record",
    "Phase2State",
    "RotaryScaling",
    "convert_phase1_to_phase2",
    "convert_transformer",
    "create_phase2_model",
    "get_phase2_preset",
    "match_readouts",
    "save_transformer",
    "transformer_config",
]
