"""Validation of a model in training: held-out text, of which every process reads a share."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from resolvent.evaluation.language import Stretches, calls_of_model, sum_of_nats
from resolvent.models.inference import evaluating
from resolvent.training.interrupt import StopRequest
from resolvent.training.progress import TrainingDisplay

_LEAST_TOKENS = 4096
_PIECE_TOKENS = 512


class StoppedInValidation(Exception):
    """Signal that a process was asked to stop during a validation."""


class Validator:
    """Reads held-out text with a model in training.

    Args:
        accelerator: device, precision and processes.
        model: the model, as the accelerator has prepared it.
        batch_tokens: tokens of a batch in training; validations read as many at once, or more.
        sharded: the model is sharded over the processes.
    """

    def __init__(self, accelerator: Accelerator, model: Any, *, batch_tokens: int, sharded: bool) -> None:
        self.accelerator, self._model, self._sharded = accelerator, model, sharded
        self._sizes = dict(batch_tokens=max(batch_tokens, _LEAST_TOKENS), piece_tokens=_PIECE_TOKENS)

    def nats(self, sample: Stretches, display: TrainingDisplay, stop: StopRequest | None) -> float:
        """Return the nats of a sample, by the weights that the model has; all processes call this.

        Args:
            sample: the sample.
            display: shows how far it is.
            stop: asks to stop; None for a validation that is not interrupted.

        Raises:
            StoppedInValidation: a process was asked to stop.
        """
        count = self.accelerator.num_processes
        shares = [sample.sequences[first::count] for first in range(count)]
        return self.accelerator.reduce(self._nats_of_share(shares, display, stop)).item()

    def _nats_of_share(
        self, shares: list[list[np.ndarray]], display: TrainingDisplay, stop: StopRequest | None
    ) -> torch.Tensor:
        """Return the nats of this process's tokens. All processes take equally many rounds, so that all can stop."""
        accelerator = self.accelerator
        mine = shares[accelerator.process_index]
        model = accelerator.unwrap_model(self._model, keep_torch_compile=False)  # pieces have many shapes
        calls = [calls_of_model(share, **self._sizes) for share in shares]
        with evaluating(model), display.validating(sum(map(len, mine)) - len(mine)) as show:

            def advance(tokens: int) -> None:
                show(tokens)
                if stop is not None and self._is_asked_to_stop(stop):
                    raise StoppedInValidation

            nats = sum_of_nats(model, mine, **self._sizes, advance=advance)
            for _ in range(max(calls) - calls[accelerator.process_index]):
                if self._sharded:  # every call needs all processes, also those that have read their share
                    self._call_idly()
                advance(0)
        return torch.tensor(nats, dtype=torch.float64, device=accelerator.device)

    def _is_asked_to_stop(self, stop: StopRequest) -> bool:
        """Return True if any process was asked to stop; all processes call this."""
        asked = stop.signal_number is not None
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)).item())

    def _call_idly(self) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.accelerator.device)
        with torch.no_grad():
            self._model(token)
