"""State of a model: an explicit object that ``forward`` takes and returns.

Shapes: B sequences; the first axis of every tensor of a state counts them.
"""

import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, VersionError
from ..files import output_path
from ..ops.attention_window import join_windows
from ..tensors import read_tensors, write_tensors
from ..wording import counted

_COMPLEX = ":complex"
"""End of the name of a complex tensor in a file, which holds its real and imaginary parts."""

EXTRA = "extra."
"""Beginning of the names of tensors in a file that are not of the state."""

State = TypeVar("State", bound="ModelState")
Structure = TypeVar("Structure")


@dataclass(frozen=True, repr=False)
class ModelState:
    """State of a model for B sequences: differentiable, movable, and of a size that does not depend on the tokens read.

    Its real numbers are float32, or float64 in a float64 model, and its complex numbers pairs of these; weights in half
    precision do not change that, but for keys and values, which stay as they were attended to.

    Attributes:
        exact: fields of the layers' states that are float64 in every model.
        as_read: fields that stay in half precision where their tokens were read in it.
        growing: fields whose tensors grow along their second axis with the number of tokens read.
        position: tokens that each sequence has read, int64 (B,); on the CPU, where Python reads it without waiting,
            but for steps that are captured as a graph.
        layers: one state per block, a named tuple of tensors and of such tuples.
    """

    layer_type: ClassVar[type]
    exact: ClassVar[frozenset[str]] = frozenset()
    as_read: ClassVar[frozenset[str]] = frozenset()
    growing: ClassVar[frozenset[str]] = frozenset()

    position: Tensor
    layers: tuple[NamedTuple, ...]

    def __len__(self) -> int:
        """Return the number of sequences B."""
        return len(self.position)

    def __repr__(self) -> str:
        """Return one line: type, sequences, tokens read, layers, size and device."""
        read = self.position.tolist()
        least, most = min(read, default=0), max(read, default=0)
        tokens = counted(most, "token") if least == most else f"{least:,} to {most:,} tokens"
        return (
            f"{type(self).__name__}({counted(len(self), 'sequence')}, {tokens} read, "
            f"{counted(len(self.layers), 'layer')}, {self.nbytes:,} bytes on {self.device})"
        )

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Size in bytes of the position and of every field of the layers' states: of memories and windows apart."""
        found = {"position": self.position.nbytes}
        for name, x in self._layer_tensors():
            field = name.split(".")[2]
            found[field] = found.get(field, 0) + x.nbytes
        return found

    @property
    def device(self) -> torch.device:
        """Device of the layers' states."""
        return next(x for _, x in named_tensors(self.layers[0])).device

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``function`` to every tensor; the first axis of each counts the sequences."""
        return type(self)(function(self.position), self._map_layers(function))

    def detach(self) -> Self:
        """Return the state without its graph: later losses have no gradient in earlier tokens."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """Return a copy in memory of its own: views of larger tensors, which they would hold, become small tensors."""
        return self.map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the state with its layers on another device, in another precision or both.

        Args:
            device: device of the layers; None keeps theirs. A dtype may take its place: ``to(torch.float64)``.
            dtype: float32 or float64, as the model that reads on needs it; None keeps it. The fields of ``exact`` stay
                float64, and those of ``as_read`` in half precision where they are.

        Raises:
            ValueError: the dtype is another one, in which sums would lose digits, or imaginary parts would be lost.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"a state is float32 or float64, got {dtype}: models in half precision have a state in float32, too"
            )
        moved = iter([x.to(device, self._dtype(name, x, dtype)) for name, x in self._layer_tensors()])
        return type(self)(self.position, self._map_layers(lambda _: next(moved)))

    def with_position_on(self, device: torch.device) -> Self:
        """Return the state with its position on a device, where kernels read it and Python does not."""
        return type(self)(self.position.to(device), self.layers)

    def reusable(self) -> Self:
        """Return the state as one whose tensors the next step may overwrite: its caller holds the only reference.

        Its tensors may be copies, in a layout that is read faster.
        """
        return self

    def in_place(self) -> Self:
        """Return the state as one whose tensors the next step may overwrite, in the memory of these very tensors."""
        return self

    def with_room(self, tokens: int) -> Self:
        """Return the state with slots for so many more tokens of every sequence, where it grows with them.

        Python reads the position, wherever it is.
        """
        del tokens
        return self

    def check(
        self, shapes: list[list[tuple[int, ...]]], sequences: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raise a ValueError unless a model can read on from this state.

        Args:
            shapes: shapes of one sequence's state in that model: of every layer, every tensor; -1 for any size.
            sequences: number of sequences in the model's input.
            device: device of the input.
            dtype: dtype of the model's states, float32 or float64.
        """
        if len(self) != sequences:
            raise ValueError(f"the state holds {counted(len(self), 'sequence')}, the input has {sequences}")
        tensors = list(self._layer_tensors())
        if difference := self._difference(shapes):
            raise ValueError(
                f"the state belongs to another model, with other layers, heads or widths: {difference}; read the text "
                "again with this model"
            )
        if self.device != device:
            raise ValueError(f"the state is on {self.device}, the input on {device}; use state.to({str(device)!r})")
        if self.position.dtype != torch.int64:
            raise ValueError(f"the state's position must be int64, got {self.position.dtype}")
        for name, x in tensors:
            if len(x) != sequences or x.device != device:
                raise ValueError(
                    f"{name} of the state holds {len(x)} sequences on {x.device}, its position {sequences} on {device}"
                )
            if x.dtype != (wanted := self._dtype(name, x, dtype)):
                raise ValueError(f"{name} of the state is {x.dtype}, of the model {wanted}; use state.to({dtype})")

    def _difference(self, shapes: list[list[tuple[int, ...]]]) -> str:
        """Return the first difference from the shapes of a model; "" for none."""
        if len(self.layers) != len(shapes):
            return f"it has {counted(len(self.layers), 'layer')}, the model {len(shapes)}"
        for i, (layer, wanted) in enumerate(zip(self.layers, shapes, strict=True)):
            found = [(name, tuple(x.shape[1:])) for name, x in named_tensors(layer, f"layers.{i}")]
            if len(found) != len(wanted):
                return f"layers.{i} has {counted(len(found), 'tensor')}, in the model {len(wanted)}"
            for (name, shape), expected in zip(found, wanted, strict=True):
                if not _fits(shape, expected):
                    return f"{name} of a sequence has the shape {shape}, in the model {expected}"
        return ""

    def signature(self) -> tuple[tuple[torch.Size, torch.dtype, torch.device], ...]:
        """Return all that ``check`` looks at: of every tensor, its shape, dtype and device."""
        return tuple((x.shape, x.dtype, x.device) for x in (self.position, *_flat(self.layers)))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, always in the same order."""
        return list(self._tensors().values())

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """Return the state of some sequences, in the order asked for."""
        if isinstance(rows, slice):
            return self.map(lambda x: x[rows])
        index = torch.as_tensor(rows)
        if not len(index):  # an empty list has no dtype of its own
            index = index.long()
        return self.map(lambda x: x[index.to(x.device)])

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Join the sequences of several states of one model into one state, in order.

        So sequences join a batch, which they leave by an index.

        Raises:
            ValueError: there are none, or they are of different models.
        """
        if not states:
            raise ValueError("there is no state to join; give at least one")
        parts = [list(state._tensors().items()) for state in states]
        if len({tuple((name, cls._shape(name, x)) for name, x in named) for named in parts}) > 1:
            raise ValueError("the states belong to different models: their layers, heads or widths differ")
        joined = iter(
            (join_windows if cls._grows(named[0][0]) else torch.cat)([x for _, x in named])
            for named in zip(*parts, strict=True)
        )
        return states[0].map(lambda _: next(joined))

    def repeat(self, times: int) -> Self:
        """Repeat every sequence ``times`` in a row, to continue one beginning in several ways."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    def save(self, path: str | Path, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write to a safetensors file. Of a link, the target is written.

        Args:
            path: the file.
            extra: more tensors for the file, under names that begin with ``EXTRA``; ``load`` leaves them out.

        Raises:
            ValueError: a name of ``extra`` begins otherwise.
        """
        tensors = dict(extra or {})
        if wrong := [name for name in tensors if not name.startswith(EXTRA)]:
            raise ValueError(f"the name of an extra tensor must begin with {EXTRA!r}, got {wrong[0]!r}")
        for name, x in self._tensors().items():
            x = x.detach().resolve_conj()
            tensors[name + _COMPLEX * x.is_complex()] = torch.view_as_real(x) if x.is_complex() else x
        write_tensors(output_path(Path(path)), tensors)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what ``save`` wrote.

        Raises:
            VersionError: a newer version wrote the file.
            CheckpointError: the file cannot be read, or holds no state of this release.
        """
        try:
            stored = read_tensors(Path(path)).items()
            tensors = {
                name.removesuffix(_COMPLEX): torch.view_as_complex(x) if name.endswith(_COMPLEX) else x
                for name, x in stored
            }
            count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
            layers = tuple(_assemble(cls.layer_type, tensors, f"layers.{i}") for i in range(count))
            state = cls(tensors["position"], layers).to(device)
            own = {name for name in tensors if not name.startswith(EXTRA)}
            if unknown := own - state._tensors().keys():
                raise ValueError(
                    f"this release has no {', '.join(sorted(unknown))}, another one wrote it; read the text again"
                )
            return state
        except VersionError:
            raise
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no saved state: {error}") from error

    def _map_layers(self, function: Callable[[Tensor], Tensor]) -> tuple[NamedTuple, ...]:
        return tuple(map_tensors(layer, function) for layer in self.layers)

    def _tensors(self) -> dict[str, Tensor]:
        return {"position": self.position, **dict(self._layer_tensors())}

    def _layer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, layer in enumerate(self.layers):
            yield from named_tensors(layer, f"layers.{i}")

    @classmethod
    def _shape(cls, name: str, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sequence's tensor, without the axis along which it grows."""
        return tuple(x.shape[1 + cls._grows(name) :])

    @classmethod
    def _grows(cls, name: str) -> bool:
        return not cls.growing.isdisjoint(name.split("."))

    def _dtype(self, name: str, x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of a layer's tensor in a state whose real numbers are of ``dtype``."""
        field = name.rpartition(".")[2]
        if dtype is None or not (x.is_complex() or x.is_floating_point()):
            return x.dtype
        if field in self.as_read and x.dtype in (torch.bfloat16, torch.float16):
            return x.dtype
        dtype = torch.float64 if field in self.exact else dtype
        return dtype.to_complex() if x.is_complex() else dtype


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return True if a shape is the one wanted, in which -1 stands for any size."""
    return len(shape) == len(wanted) and all(b in (a, -1) for a, b in zip(shape, wanted, strict=True))


def map_tensors(value: Structure, function: Callable[[Tensor], Tensor]) -> Structure:
    """Apply ``function`` to every tensor of a structure of named tuples; None stays None."""
    if value is None or isinstance(value, Tensor):
        return cast(Structure, value if value is None else function(value))
    return type(value)(*(map_tensors(part, function) for part in cast(tuple, value)))


def _flat(value: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in a structure of tuples."""
    for part in value:
        if isinstance(part, Tensor):
            yield part
        elif part is not None:
            yield from _flat(part)


def named_tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a structure of named tuples, each with the path of fields that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        for field, part in cast(NamedTuple, value)._asdict().items():
            yield from named_tensors(part, f"{name}.{field}")


def _assemble(kind: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Invert ``named_tensors``: an optional part is None if none of its tensors is there."""
    if kind is Tensor:
        return tensors[name]
    options = typing.get_args(kind)
    if type(None) in options:
        if not any(stored == name or stored.startswith(f"{name}.") for stored in tensors):
            return None
        return _assemble(next(option for option in options if option is not type(None)), tensors, name)
    parts = typing.get_type_hints(kind).items()
    return kind(*(_assemble(part_kind, tensors, f"{name}.{field}") for field, part_kind in parts))
