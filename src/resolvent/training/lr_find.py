"""A learning-rate range test (Smith, 2017): short training at a rate that rises with every step."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from resolvent.terminal import say
from resolvent.training.average import Average
from resolvent.training.config import TrainingConfig
from resolvent.training.optimizer import learning_rates
from resolvent.training.run import new_trainer

_LOWEST, _HIGHEST, _STEPS = 1e-5, 1.0, 120
_SMOOTHING = 0.9
_DIVERGED = 1.25
"""Smoothed loss over the lowest before it, at which the test ends."""
_ROWS = 16


@dataclass(frozen=True, repr=False)
class RangeTest:
    """Losses by learning rate.

    Attributes:
        rates: learning rate of every step.
        losses: smoothed loss of every step, in nats per token.
        suggestion: a peak learning rate to train with: where the loss falls fastest, below the rate of the lowest
            loss; None if it never falls.
        muon_ratio: Muon's learning rate over those here, which are AdamW's; None without Muon.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float | None
    muon_ratio: float | None = None

    def __repr__(self) -> str:
        suggestion = None if self.suggestion is None else f"{self.suggestion:.1e}"
        return f"RangeTest({len(self.rates)} steps, suggestion {suggestion})"

    def table(self) -> Sequence[tuple[float, float]]:
        """Return some of the rates, with their losses."""
        stride = max(1, -(-len(self.rates) // _ROWS))
        return [*zip(self.rates, self.losses, strict=True)][::stride]

    @property
    def advice(self) -> str:
        """Recommended learning rates, in a sentence."""
        if self.suggestion is None:
            return "The loss did not fall at any learning rate: look at the text and the model"
        lowest = self.rates[self.losses.index(min(self.losses))]
        muon = "" if self.muon_ratio is None else f" --muon-lr {self.muon_ratio * self.suggestion:.1e}"
        return (
            f"The loss falls fastest at {self.suggestion:.1e}, and is lowest at {lowest:.1e}, which is too high "
            f"for a long run: try --learning-rate {self.suggestion:.1e}{muon}"
        )

    def plot(self, path: str | Path) -> None:
        """Draw the losses, as .png, .pdf or .svg.

        Raises:
            ConfigError: matplotlib is not installed, or the name of the file has another ending.
        """
        from resolvent.training.plots import Curve, draw

        draw(Path(path), "learning rate", {"loss (nats per token)": [Curve(self.rates, self.losses)]}, log=True)


def find_learning_rate(config: TrainingConfig, *, console: Console | None = None) -> RangeTest:
    """Train from the configuration's weights at rising learning rates until the loss rises.

    No run folder is made; the cache keeps the tokens for the run. With Muon, its learning rate rises too, in the ratio
    to AdamW's that the configuration has.

    Args:
        config: the run.
        console: where to show progress; None shows nothing.

    Raises:
        ConfigError: faults of the configuration, or more memory than there is.
        CheckpointError: there is no model to start from.
        DataError: text or tokenizer that cannot be used.
    """
    config.validate()
    config = dataclasses.replace(config, compile=bool(config.compile))  # by default not for so few steps
    rates: list[float] = []
    losses: list[float] = []
    with new_trainer(config, console) as trainer:
        say(trainer.console, f"Trying learning rates from {_LOWEST:g} to {_HIGHEST:g} in up to {_STEPS} steps")
        trainer.train_step.model.train()
        average = Average(_SMOOTHING)
        for step in range(_STEPS):
            rate = _LOWEST * (_HIGHEST / _LOWEST) ** (step / (_STEPS - 1))
            loss, norm, _ = trainer.update(rate / trainer.peak_learning_rate).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                break
            rates.append(rate)
            losses.append(average.update(loss))
            if losses[-1] > _DIVERGED * min(losses):
                break
        last = learning_rates(trainer.train_step.raw_optimizer)
    ratio = last["muon_lr"] / last["lr"] if "muon_lr" in last else None
    return RangeTest(rates, losses, _suggestion(rates, losses), ratio)


def _suggestion(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate below that of the lowest loss at which the loss falls fastest; None if it does not fall.

    Slopes are those on a logarithmic axis. Behind the lowest loss, a fall is noise after a rise.
    """
    if len(losses) < 2 or min(losses) >= losses[0]:
        return None
    lowest = losses.index(min(losses))
    slopes = np.gradient(losses[: lowest + 1], np.log(rates[: lowest + 1]))
    return rates[int(np.argmin(slopes[:lowest]))]
