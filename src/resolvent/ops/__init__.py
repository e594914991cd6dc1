"""Pure functions on tensors, which the layers call.

The tensor that ``forward`` of an ``autograd.Function`` returns must never have had another name: no operation in place
makes it, no ``to`` that changes nothing. PyTorch 2.11 compiles such a function with a gradient of zero (its issue
180642).
"""

from .attention import local_attention, local_attention_reference, local_attention_step
from .attention_window import ReusedWindow, WindowState
from .bk_core import (
    effective_diagonal,
    resolvent_diagonal,
    resolvent_diagonal_reference,
    resolvent_features,
    resolvent_step,
    resolvent_step_of_parts,
)
from .consolidation import Consolidation, Resonance, SNRFilter, consolidate
from .cross_entropy import IGNORED, linear_cross_entropy
from .hebbian import dissipative_memory, dissipative_memory_reference, dissipative_memory_step
from .likeliest import likeliest
from .memory_state import MemoryState
from .semiseparable import gated_prefix_sum, gated_prefix_sum_reference, gated_prefix_sum_step

__all__ = [
    "IGNORED",
    "Consolidation",
    "MemoryState",
    "Resonance",
    "ReusedWindow",
    "SNRFilter",
    "WindowState",
    "consolidate",
    "dissipative_memory",
    "dissipative_memory_reference",
    "dissipative_memory_step",
    "effective_diagonal",
    "gated_prefix_sum",
    "gated_prefix_sum_reference",
    "gated_prefix_sum_step",
    "likeliest",
    "linear_cross_entropy",
    "local_attention",
    "local_attention_reference",
    "local_attention_step",
    "resolvent_diagonal",
    "resolvent_diagonal_reference",
    "resolvent_features",
    "resolvent_step",
    "resolvent_step_of_parts",
]
