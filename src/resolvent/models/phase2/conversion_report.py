"""Report of a conversion: one record for every tensor, copied, new or left behind."""

import dataclasses
import math
from typing import Literal

from ...wording import counted

Status = Literal["copied", "new", "left behind"]
ConfigChanges = dict[str, tuple[object, object]]


@dataclasses.dataclass(frozen=True)
class ConvertedTensor:
    """Record of one tensor.

    Attributes:
        status: ``copied`` out of the source, ``new`` in the target, or ``left behind`` in the source.
        name: of the target's parameter; of the source's where it was left behind.
        shape: its shape.
        sources: the tensors of the source that it was made of.
        note: the computation, where it was more than copying.
    """

    status: Status
    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    note: str = ""

    @property
    def count(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class ConversionReport:
    """Records of all tensors of a conversion.

    Attributes:
        tensors: those of the target in its order, then those that were left behind.
        config_changes: fields in which the source requires another value than the configuration asked for, with the
            value asked for and the value used.
        exact: the target has the logits of the source.
    """

    tensors: tuple[ConvertedTensor, ...]
    config_changes: ConfigChanges = dataclasses.field(default_factory=dict)
    exact: bool = True

    def __repr__(self) -> str:
        return f"ConversionReport({self.summary()})"

    @property
    def copied(self) -> list[ConvertedTensor]:
        return self._with("copied")

    @property
    def new(self) -> list[ConvertedTensor]:
        return self._with("new")

    @property
    def left_behind(self) -> list[ConvertedTensor]:
        return self._with("left behind")

    def parameters(self, status: Status) -> int:
        """Return the number of entries of all tensors of a status."""
        return sum(tensor.count for tensor in self._with(status))

    def summary(self) -> str:
        """Return one line of counts."""
        parts = ((self._with(status), status) for status in ("copied", "new", "left behind"))
        return ", ".join(
            f"{counted(len(tensors), 'tensor')} ({sum(t.count for t in tensors):,} parameters) {status}"
            for tensors, status in parts
        )

    def to_dict(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)

    def _with(self, status: Status) -> list[ConvertedTensor]:
        return [tensor for tensor in self.tensors if tensor.status == status]
