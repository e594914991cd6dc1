"""State of a Phase 1 model.

Shapes: B sequences, H heads.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from ...layers import SemiseparableState
from ..state import ModelState


class Phase1LayerState(NamedTuple):
    """State of one block.

    Attributes:
        resolvent: g of the last token, complex64 (B, H).
        ar_ssm: sum and conv state of the semiseparable layer, where a block has one.
    """

    resolvent: Tensor
    ar_ssm: SemiseparableState | None = None


@dataclass(frozen=True, repr=False)
class Phase1State(ModelState):
    """State of a Phase 1 model: per layer the last value of the resolvent and the sum of the semiseparable layer."""

    layer_type: ClassVar[type[Phase1LayerState]] = Phase1LayerState
    exact: ClassVar[frozenset[str]] = frozenset({"total"})

    layers: tuple[Phase1LayerState, ...]
