"""A stand-in for CUDA graphs, with which their callers run on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resolvent.models.state import map_tensors


class Launched:
    """Stands for a graph: a replay calls the captured function, and overwrites the result of the capture."""

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self._run, self._result = run, result

    def replay(self) -> None:
        for old, new in zip(_tensors(self._result), _tensors(self._run()), strict=True):
            old.copy_(new)


def launched(device: torch.device, run: Callable[[], Any], trial: Callable[[], Any] | None = None) -> tuple[Any, Any]:
    """Stand for ``decoding.captured``: warm up, and return the graph and its result, which has no meaning yet."""
    del device
    for _ in range(2):
        result = (trial or run)()
    result = map_tensors(result, torch.clone)
    return Launched(run, result), result


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]
