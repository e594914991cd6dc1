"""The parts of a block: modules that hold parameters and call one operator each."""

from .hebbian import DissipativeHebbianLayer, LyapunovStabilityMonitor
from .memory_resonance import MemoryResonanceLayer
from .memory_selection import SNRMemoryFilter
from .potential import DissipativeBKLayer, NonHermitianPotential
from .zeta import ZetaEmbedding, ZetaInitializer, resonance_basis, zeta_zeros

__all__ = [
    "DissipativeBKLayer",
    "DissipativeHebbianLayer",
    "LyapunovStabilityMonitor",
    "MemoryResonanceLayer",
    "NonHermitianPotential",
    "SNRMemoryFilter",
    "ZetaEmbedding",
    "ZetaInitializer",
    "resonance_basis",
    "zeta_zeros",
]
