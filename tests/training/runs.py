"""Runs of tests: what they wrote, and what happens to them on the way."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from resolvent.data import Batch
from resolvent.training.train_step import TrainStep
from resolvent.training.trainer import Trainer


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics but for how fast it was."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_second", None)
    return records


def tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimiser state."""
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    return load_file(run_dir / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def assert_same_run(ours: Path, theirs: Path, steps: int) -> None:
    assert metrics(ours) == metrics(theirs)
    mine, yours = tensors(ours, steps), tensors(theirs, steps)
    assert mine.keys() == yours.keys()
    for name in mine:
        assert torch.equal(mine[name], yours[name]), name


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something once, in the middle of a run."""
    report = Trainer._report

    def report_and_act(self: Trainer, reported: int, *values: float) -> None:
        report(self, reported, *values)
        if reported == step:
            monkeypatch.setattr(Trainer, "_report", report)
            action()

    monkeypatch.setattr(Trainer, "_report", report_and_act)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, step: int, rewinds: int) -> None:
    """Make the loss of a step NaN as long as the run has rewound less often than ``rewinds``."""
    loss_of = TrainStep._loss
    trainers: list[Trainer] = []
    on_start(monkeypatch, trainers.append)

    def spoilt(self: TrainStep, batch: Batch) -> tuple[Tensor, Tensor | float]:
        loss, penalty = loss_of(self, batch)
        state = trainers[-1].state
        return loss * (math.nan if state.step + 1 == step and state.rewinds < rewinds else 1.0), penalty

    monkeypatch.setattr(TrainStep, "_loss", spoilt)


def on_start(monkeypatch: pytest.MonkeyPatch, action: Callable[[Trainer], None]) -> None:
    introduce = Trainer._introduce
    monkeypatch.setattr(Trainer, "_introduce", lambda self: (introduce(self), action(self)))
