"""State of a Phase 2 model.

Shapes: B sequences, H heads, K = V head width, W convolution width, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, cast

from torch import Tensor

from ...layers import SemiseparableState
from ...ops import MemoryState, ReusedWindow, WindowState
from ...ops.attention_window import in_blocks, with_capacity
from ...ops.memory_rotation import angles_of, rotate_memory
from ..state import ModelState


class LayerState(NamedTuple):
    """State of one block.

    Attributes:
        resolvent: g of the last token, complex64 (B, H); None without BK-Core.
        memory: the Hebbian memory, float32; None where the block attends.
        conv_tail: conv state: the last inputs of the short convolution, float32 (B, W - 1, 3HK).
        ar_ssm: sum and conv state of the semiseparable layer, where a block has one.
        phases: phases of the pairs of key channels, in turns, float64 (B, K / 2), where the memory rotates.
        window: keys and values of the last tokens, where a block attends to a window.
        cache: keys and values of all tokens, where a block attends to all.
    """

    resolvent: Tensor | None
    memory: MemoryState | None
    conv_tail: Tensor
    ar_ssm: SemiseparableState | None = None
    phases: Tensor | None = None
    window: WindowState | None = None
    cache: WindowState | None = None

    def facing_memory(self) -> Tensor | None:
        """Return the memory as a query that is not rotated meets it, ``R(-Φ) S``: (B, H, K, V); None without memory."""
        if self.memory is None:
            return None
        memory = self.memory.memory
        return memory if self.phases is None else rotate_memory(memory, -angles_of(self.phases, memory.dtype))


@dataclass(frozen=True, repr=False)
class Phase2State(ModelState):
    """State of a Phase 2 model: per layer the last value of the resolvent, the conv state, and memory or window."""

    layer_type: ClassVar[type[LayerState]] = LayerState
    exact: ClassVar[frozenset[str]] = frozenset({"total", "phases"})
    as_read: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    growing: ClassVar[frozenset[str]] = frozenset({"cache"})

    layers: tuple[LayerState, ...]

    def reusable(self) -> Self:
        return type(self)(self.position, _with_windows(self.layers, ReusedWindow.of))

    def in_place(self) -> Self:
        return type(self)(self.position, _with_windows(self.layers, lambda window: ReusedWindow(*window)))

    def with_room(self, tokens: int) -> Self:
        if not any(layer.cache for layer in self.layers):
            return self
        slots = in_blocks(int(self.position.max()) + tokens)
        grown = [layer.cache and ReusedWindow.of(with_capacity(layer.cache, slots)) for layer in self.layers]
        layers = [layer._replace(cache=cache) for layer, cache in zip(self.layers, grown, strict=True)]
        return type(self)(self.position, tuple(layers))

    def _map_layers(self, function: Callable[[Tensor], Tensor]) -> tuple[LayerState, ...]:
        """Apply a function to every tensor; the result may have other references, and is not to be overwritten."""
        mapped = cast(tuple[LayerState, ...], super()._map_layers(function))
        return _with_windows(mapped, lambda window: WindowState(*window))


def _with_windows(
    layers: tuple[LayerState, ...], function: Callable[[WindowState], WindowState]
) -> tuple[LayerState, ...]:
    """Return the states of all blocks with other windows."""
    return tuple(
        layer._replace(window=layer.window and function(layer.window), cache=layer.cache and function(layer.cache))
        for layer in layers
    )
