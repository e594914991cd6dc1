"""State of a Phase 2 model.

Shapes: B sequences, H heads, K = V head width, W convolution width, D model width.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from ...layers import SemiseparableState
from ...ops import MemoryState
from ...ops.memory_rotation import angles_of, rotate_memory
from ..state import ModelState


class LayerState(NamedTuple):
    """State of one block.

    Attributes:
        resolvent: g of the last token, complex64 (B, H).
        memory: the Hebbian memory, float32.
        conv_tail: conv state: the last inputs of the short convolution, float32 (B, W - 1, 3HK).
        ar_ssm: sum and conv state of the semiseparable layer, where a block has one.
        phases: phases of the pairs of key channels, in turns, float64 (B, K / 2), where the memory rotates.
    """

    resolvent: Tensor
    memory: MemoryState
    conv_tail: Tensor
    ar_ssm: SemiseparableState | None = None
    phases: Tensor | None = None

    def facing_memory(self) -> Tensor:
        """Return the memory as a query that is not rotated meets it, ``R(-Φ) S``: (B, H, K, V)."""
        memory = self.memory.memory
        return memory if self.phases is None else rotate_memory(memory, -angles_of(self.phases, memory.dtype))


@dataclass(frozen=True, repr=False)
class Phase2State(ModelState):
    """State of a Phase 2 model: per layer the last value of the resolvent, the memory and the conv state."""

    layer_type: ClassVar[type[LayerState]] = LayerState
    exact: ClassVar[frozenset[str]] = frozenset({"total", "phases"})

    layers: tuple[LayerState, ...]
