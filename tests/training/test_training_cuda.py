"""Training on a GPU: what differs from the CPU."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resolvent.models import load_model
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record.get("loss", record.get("validation_loss")) for record in records]


def test_the_default_is_bf16_on_cuda(small_config: Callable[..., TrainingConfig], tmp_path: Path):
    model = small_config().model
    assert model is not None
    model.dropout = 0.0
    gentle = dict(model=model, learning_rate=1e-4)  # AdamW turns the rounding of tiny gradients into whole steps
    train(small_config(**gentle, out=str(tmp_path / "cpu")))
    train(small_config(**gentle, out=str(tmp_path / "fp32"), device="cuda", precision="fp32"))
    result = train(small_config(**gentle, out=str(tmp_path / "bf16"), device="auto"))
    assert next(result.model.parameters()).device.type == "cuda"
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert losses(tmp_path / "fp32") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "cpu"), rel=3e-2)
    assert losses(tmp_path / "bf16") != pytest.approx(losses(tmp_path / "fp32"), rel=1e-7)


def test_a_stopped_run_resumes(
    small_config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fused optimiser's state and dropout's seeds survive; sums on a GPU may differ in their last bits."""
    train(small_config(out=str(tmp_path / "whole"), device="cuda"))
    report = Trainer._report

    def stop_after_5(self: Trainer, *values: float) -> None:
        report(self, *values)
        if self.standing.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_report", stop_after_5)
    with pytest.raises(TrainingInterrupted):
        train(small_config(out=str(tmp_path / "parts"), device="cuda"))
    monkeypatch.setattr(Trainer, "_report", report)
    resume(tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    assert load_model(tmp_path / "parts", device="cpu").vocab_size == 257
