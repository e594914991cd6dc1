"""What a Phase 2 model knows of the past: an explicit object, handed in and out of ``forward``.

Shapes: B sequences, H heads, K = V head width, W convolution width, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ...ops import MemoryState


class LayerState(NamedTuple):
    """State of one block.

    Attributes:
        resolvent: g of the last token, complex64 (B, H).
        memory: the Hebbian memory, float32.
        conv_tail: the last inputs of the short convolution, float32 (B, W - 1, 3HK).
    """

    resolvent: Tensor
    memory: MemoryState
    conv_tail: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerState":
        return LayerState(
            function(self.resolvent), MemoryState(*(function(x) for x in self.memory)), function(self.conv_tail)
        )


@dataclass(frozen=True)
class Phase2State:
    """State of a model for B sequences: differentiable, movable, and of a size that does not depend on what was read.

    Attributes:
        position: tokens that each sequence has read, int64 (B,); on the CPU, where Python reads it without waiting.
        layers: one state a block.
    """

    position: Tensor
    layers: tuple[LayerState, ...]

    def __len__(self) -> int:
        """Number of sequences B."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(x.numel() * x.element_size() for x in self._tensors().values())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``function`` to every tensor; the first axis of each counts the sequences."""
        return type(self)(function(self.position), tuple(layer.map(function) for layer in self.layers))

    def detach(self) -> Self:
        """Cut the graph: what comes next sends no gradient to what came before."""
        return self.map(Tensor.detach)

    @property
    def device(self) -> torch.device:
        """Where the layers' states are."""
        return self.layers[0].resolvent.device

    def to(self, device: torch.device | str) -> Self:
        """The state with its layers on another device."""
        return type(self)(self.position, tuple(layer.map(lambda x: x.to(device)) for layer in self.layers))

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """The state of some sequences, in the order asked for."""
        if isinstance(rows, slice):
            return self.map(lambda x: x[rows])
        index = torch.as_tensor(rows)
        return self.map(lambda x: x[index.to(x.device)])

    def repeat(self, times: int) -> Self:
        """Every sequence ``times`` in a row, to continue one beginning in several ways."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        tensors = {name: torch.view_as_real(x) if x.is_complex() else x for name, x in self._tensors().items()}
        save_file({name: x.detach().contiguous().cpu() for name, x in tensors.items()}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: the file cannot be read or holds no state.
        """
        try:
            tensors = load_file(path)
            count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
            layers = tuple(
                LayerState(
                    torch.view_as_complex(tensors[f"layers.{i}.resolvent"]),
                    MemoryState(*(tensors[f"layers.{i}.{name}"] for name in MemoryState._fields)),
                    tensors[f"layers.{i}.conv_tail"],
                )
                for i in range(count)
            )
            return cls(tensors["position"], layers).to(device)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no saved state: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"position": self.position}
        for i, layer in enumerate(self.layers):
            tensors[f"layers.{i}.resolvent"] = layer.resolvent
            tensors[f"layers.{i}.conv_tail"] = layer.conv_tail
            tensors.update({f"layers.{i}.{name}": x for name, x in layer.memory._asdict().items()})
        return tensors
