"""Experiments whose score is an accuracy, the mean over several tests."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from experiments.quality.models import Entry
from experiments.quality.training import Clock, Trainer


class AccuracyExperiment:
    """One entry, prepared once for all seeds and learning rates; a subclass has the task.

    Args:
        entry: on the device.
    """

    trainer: Trainer

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    @property
    def seconds(self) -> float:
        """Approximate duration of a run, without its test."""
        raise NotImplementedError

    def draw(self, seed: int) -> list[int]:
        """Draw the training sequences of a seed, and return the kind of every step."""
        raise NotImplementedError

    def rates(self, peak: float) -> Tensor:
        """Return the learning rates of all steps."""
        raise NotImplementedError

    def accuracies(self) -> dict[str, float]:
        """Return the accuracy of every test, by its name."""
        raise NotImplementedError

    def run(self, learning_rate: float, seed: int, clock: Clock) -> dict[str, Any]:
        """Train and test; return the results.

        Raises:
            OutOfTimeError: the run would not end in time.
        """
        clock.check(self.seconds)
        self.entry.reset(seed)
        torch.manual_seed(seed)
        kinds = self.draw(seed)
        self.trainer.start(self.rates(learning_rate))
        started = time.perf_counter()
        finite = self.trainer.advance(kinds, clock)
        seconds = time.perf_counter() - started
        accuracies = self.accuracies()
        return {
            "parameters": self.entry.parameters,
            "state_bytes": self.entry.state_bytes,
            "finite": finite,
            "accuracy": sum(accuracies.values()) / len(accuracies),
            "accuracies": accuracies,
            "train_loss": sum(last := self.trainer.losses()[-50:]) / len(last) if finite else None,
            "seconds": seconds,
        }
