"""State of a Phase 2 model.

Shapes: B sequences, H heads, K = V head width, W convolution width, D model width.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from torch import Tensor

from ...layers import SemiseparableState
from ...ops import MemoryState, ReusedWindow, WindowState
from ..state import ModelState


class LayerState(NamedTuple):
    """State of one block.

    Attributes:
        resolvent: g of the last token, complex64 (B, H).
        memory: the Hebbian memory, float32; None where the block attends.
        conv_tail: conv state: the last inputs of the short convolution, float32 (B, W - 1, 3HK).
        ar_ssm: sum and conv state of the semiseparable layer, where a block has one.
        window: keys and values of the last tokens, where a block attends to a window.
        cache: keys and values of all tokens, where a block attends to all.
    """

    resolvent: Tensor
    memory: MemoryState | None
    conv_tail: Tensor
    ar_ssm: SemiseparableState | None = None
    window: WindowState | None = None
    cache: WindowState | None = None


@dataclass(frozen=True, repr=False)
class Phase2State(ModelState):
    """State of a Phase 2 model: per layer the last value of the resolvent, the conv state, and memory or window."""

    layer_type: ClassVar[type[LayerState]] = LayerState
    exact: ClassVar[frozenset[str]] = frozenset({"total"})
    as_read: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    growing: ClassVar[frozenset[str]] = frozenset({"cache"})

    layers: tuple[LayerState, ...]

    def reusable(self) -> Self:
        reused = [
            layer._replace(
                window=layer.window and ReusedWindow(*layer.window), cache=layer.cache and ReusedWindow(*layer.cache)
            )
            for layer in self.layers
        ]
        return type(self)(self.position, tuple(reused))
