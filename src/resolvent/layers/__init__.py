"""Layers of a block: modules that hold parameters and call one operator each."""

from .feed_forward import GatedFeedForward, gated_width
from .hebbian import DissipativeHebbianLayer, LyapunovStabilityMonitor
from .linear import LowRankLinear
from .local_attention import LocalAttentionLayer
from .memory_resonance import MemoryResonanceLayer
from .potential import DissipativeBKLayer, NonHermitianPotential, StaticBKLayer
from .rms_norm import RMSNorm
from .semiseparable import AdaptiveRankSemiseparableLayer, SemiseparableState
from .snr_filter import SNRMemoryFilter
from .tensor_train import TensorTrainEmbedding
from .zeta import ZetaEmbedding, ZetaInitializer, resonance_basis, zeta_zeros

__all__ = [
    "AdaptiveRankSemiseparableLayer",
    "DissipativeBKLayer",
    "DissipativeHebbianLayer",
    "GatedFeedForward",
    "LocalAttentionLayer",
    "LowRankLinear",
    "LyapunovStabilityMonitor",
    "MemoryResonanceLayer",
    "NonHermitianPotential",
    "RMSNorm",
    "SNRMemoryFilter",
    "SemiseparableState",
    "StaticBKLayer",
    "TensorTrainEmbedding",
    "ZetaEmbedding",
    "ZetaInitializer",
    "gated_width",
    "resonance_basis",
    "zeta_zeros",
]
