"""metrics.jsonl: one JSON object per line, for every step and every validation."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

from resolvent.errors import CheckpointError
from resolvent.evaluation import LanguageScore
from resolvent.files import append_to, atomic_file, read_lines, shown
from resolvent.wording import counted

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of a training step.

    Attributes:
        step: number of the step, from 1.
        tokens: tokens trained on since the start.
        loss: mean nats per token of this step's batches.
        bits_per_byte: the same in bits per byte.
        lr: learning rate; with Muon, of what AdamW moves.
        grad_norm: norm of the gradient before clipping.
        tokens_per_second: speed.
        muon_lr: learning rate of what Muon moves; None if that is nothing.
    """

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    muon_lr: float | None = None


@dataclass(frozen=True)
class ValidationMetrics:
    """Measurements of a validation.

    Attributes:
        step: number of the step after which the model was validated.
        loss: mean nats per token.
        bits_per_byte: the same in bits per byte.
        tokens: held-out tokens that were predicted.
        final: whether this was the last step of the run.
        ema_loss: loss of the moving average of the weights, where there is one.
        ema_bits_per_byte: the same in bits per byte.
    """

    step: int
    loss: float
    bits_per_byte: float
    tokens: int
    final: bool
    ema_loss: float | None = None
    ema_bits_per_byte: float | None = None


@dataclass(frozen=True)
class History:
    """The metrics of a run, in order.

    Attributes:
        steps: of every training step.
        validations: of every validation.
    """

    steps: list[StepMetrics]
    validations: list[ValidationMetrics]

    def plot(self, path: str | Path) -> None:
        """Draw loss, learning rate and gradient norm by step, as .png, .pdf or .svg.

        Raises:
            ConfigError: matplotlib is not installed, or the name of the file has another ending.
        """
        from resolvent.training.plots import Curve, draw

        steps = [step.step for step in self.steps]
        validated = [validation.step for validation in self.validations]
        averaged = {x.step: x.ema_loss for x in self.validations if x.ema_loss is not None}
        losses = [
            Curve(steps, [step.loss for step in self.steps], "training"),
            Curve(validated, [validation.loss for validation in self.validations], "validation", "o-"),
        ]
        if averaged:
            losses.append(Curve([*averaged], [*averaged.values()], "validation, EMA", "x--"))
        panels = {
            "loss (nats per token)": losses,
            "learning rate": [Curve(steps, [step.lr for step in self.steps])],
            "gradient norm": [Curve(steps, [step.grad_norm for step in self.steps])],
        }
        draw(Path(path), "step", panels)

    def __repr__(self) -> str:
        return f"History({counted(len(self.steps), 'step')}, {counted(len(self.validations), 'validation')})"


def read_history(run_dir: Path) -> History:
    """Read the metrics of a run.

    Raises:
        CheckpointError: there are none, or a line is damaged.
    """
    path = run_dir / FILE_NAME
    history = History([], [])
    try:
        for line in read_lines(path):
            record = json.loads(line) if line.endswith(b"\n") else {}  # a run in progress may be writing the last line
            if not isinstance(record, dict):
                raise TypeError(f"got {shown(record)}")
            if "loss" in record:
                history.steps.append(StepMetrics(**record))
            elif "validation_loss" in record:
                history.validations.append(_validation(record))
    except OSError as error:
        raise CheckpointError(f"cannot read the metrics of the run: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds a line that is no record ({error}): restore it from a copy") from error
    return history


def _validation(record: dict[str, Any]) -> ValidationMetrics:
    measured = {name: record[f"validation_{name}"] for name in ("loss", "bits_per_byte", "tokens")}
    return ValidationMetrics(
        step=record["step"],
        final=record["final"],
        **measured,
        ema_loss=record.get("ema_validation_loss"),
        ema_bits_per_byte=record.get("ema_validation_bits_per_byte"),
    )


class MetricsLog:
    """Log of a run's metrics, open within a `with` block; each line is in the file as soon as it is written.

    Args:
        run_dir: the run folder.
        last_step: lines beyond this step are dropped first, and so is a final validation, since a resumed run
            writes them again; an incomplete last line of a killed run is dropped, too.
        enabled: whether this process writes; one process of a distributed run does.
        sha256: hash of the lines that are kept; None if it is not known.
        validated: whether a validation after the last step is kept, too.

    Raises:
        CheckpointError: the lines in the file are not those of the run, or the file is a link.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        last_step: int,
        enabled: bool = True,
        sha256: str | None = None,
        *,
        validated: bool = True,
    ) -> None:
        self._path, self._last_step, self._enabled, self._expected = run_dir / FILE_NAME, last_step, enabled, sha256
        self._validated = validated
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None

    @property
    def exists(self) -> bool:
        """True if there is a file to continue."""
        return os.path.lexists(self._path)

    @property
    def sha256(self) -> str:
        """SHA-256 of all lines so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def go_back(self, last_step: int) -> None:
        """Drop the lines beyond a step."""
        if self._file is not None:
            self._file.close()
        self._last_step, self._expected, self._validated = last_step, None, True
        self._open()

    def write(self, **record: float | str) -> None:
        """Append a record."""
        if self._file is None:
            return
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self._digest.update(line)
        while line:  # on an almost full disk, a write may be partial
            line = line[self._file.write(line) :]

    def write_validation(
        self, step: int, score: LanguageScore, averaged: LanguageScore | None = None, *, final: bool
    ) -> None:
        """Append a validation of the weights, and of their moving average where there is one."""
        measured = {f"validation_{name}": getattr(score, name) for name in ("loss", "bits_per_byte", "tokens")}
        if averaged is not None:
            measured |= {f"ema_validation_{name}": getattr(averaged, name) for name in ("loss", "bits_per_byte")}
        self.write(step=step, **measured, final=final)

    def sync(self) -> None:
        """Wait until everything written is on disk, so that a checkpoint is never ahead of its metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _open(self) -> None:
        if not self._enabled:
            return
        self._digest = hashlib.sha256()
        with atomic_file(self._path) as kept:
            for line in self._kept_lines():
                self._digest.update(line)
                kept.write(line)
            if self._expected not in (None, self.sha256):
                raise CheckpointError(
                    f"{self._path} is not what the run wrote up to step {self._last_step}: restore it from a copy, or "
                    "remove it to go on without its lines"
                )
        self._file = append_to(self._path)

    def _kept_lines(self) -> Iterator[bytes]:
        if not self.exists:
            return
        try:
            for line in read_lines(self._path, follow_links=False):
                if line.endswith(b"\n") and self._is_kept(line):
                    yield line
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self._path}: {error}; restore it from a copy, or remove it to go on without its lines"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._path} holds a line that is no record: restore it from a copy, or remove it to go on without "
                "its lines"
            ) from error

    def _is_kept(self, line: bytes) -> bool:
        record = json.loads(line)
        again = not self._validated and record["step"] == self._last_step and "validation_loss" in record
        return record["step"] <= self._last_step and not again and not record.get("final", False)
