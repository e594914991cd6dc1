"""An exponential moving average of a model's weights (EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from resolvent.training.sharding import free_whole_weights, local_tensor

_SUFFIX = "/ema"


class WeightAverage:
    """The moving average of the weights of a model; of a sharded model, of this process's shards.

    The first steps have a smaller decay, `(1 + step) / (10 + step)`, so that the average forgets the initial weights.

    Args:
        model: the model, with the weights that the average begins with.
        decay: of the average, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._weights = {name: x for name, x in model.named_parameters() if x.requires_grad}
        self._averages = {name: x.detach().clone() for name, x in self._weights.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages, under names such as `blocks.0.ffn.weight/ema`, for safetensors."""
        return {f"{name}{_SUFFIX}": x for name, x in self._averages.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from one."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, weights = ([local_tensor(x) for x in tensors.values()] for tensors in (self._averages, self._weights))
        get_ema_multi_avg_fn(decay)(averages, weights, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the weights of the model for their averages within the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        free_whole_weights(self._model)
        for name, weight in self._weights.items():
            average = self._averages[name]
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def is_average(name: str) -> bool:
    """Return True for the name of an average in a checkpoint."""
    return name.endswith(_SUFFIX)
