"""Training on a GPU: what differs from the CPU."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

from resolvent.data import Batch, PackedBatches
from resolvent.models import load_model
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.trainer import Trainer
from tests.processes import together

from .runs import after_step, metrics, on_start, spoil_loss

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


@pytest.mark.parametrize("compiled", [False, True])
def test_delayed_reports_change_no_step(
    compiled: bool, small_config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(small_config(out=str(tmp_path / "later"), device="cuda", compile=compiled))
    on_start(monkeypatch, lambda trainer: setattr(trainer, "lag", 0))
    train(small_config(out=str(tmp_path / "at once"), device="cuda", compile=compiled))
    assert losses(tmp_path / "later") == pytest.approx(losses(tmp_path / "at once"), rel=1e-4)
    assert [record["step"] for record in metrics(tmp_path / "later")] == [
        record["step"] for record in metrics(tmp_path / "at once")
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_not_finite_is_not_taken(
    compiled: bool, small_config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil_loss(monkeypatch, step=7, rewinds=1)
    train(small_config(rewinds=1, device="cuda", compile=compiled))
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == list(range(1, 11))
    record = dict(step=5, rewinds=1, failed_step=7, not_finite="the loss", lr_factor=0.5)
    assert [record for record in metrics(tmp_path / "run") if "rewinds" in record] == [record]


Recorded = tuple[list[list[int]], list[tuple[int, int, int]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Return the offsets of every batch, in order, and the counts of graphs after every step.

    The counts are how many graphs were compiled by then, and how many CUDA graphs were warmed up and recorded.
    """
    offsets: list[list[int]] = []
    steps: list[tuple[int, int, int]] = []
    calls: Counter[str] = Counter()
    torch._dynamo.reset()
    counters.clear()
    padded, report = Batch.padded, Trainer._report

    def keep(self: Batch) -> Batch:
        batch = padded(self)
        offsets.append(batch.cu_seqlens.tolist())
        return batch

    def count(self: Trainer, *values: float) -> None:
        steps.append((counters["stats"]["unique_graphs"], calls["run_eager"], calls["record_function"]))
        report(self, *values)

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(CUDAGraphTreeManager, name)

        def call(self: CUDAGraphTreeManager, *values: Any) -> Any:
            calls[name] += 1
            return function(self, *values)

        return call

    for name in ("run_eager", "record_function"):
        monkeypatch.setattr(CUDAGraphTreeManager, name, counted(name))
    monkeypatch.setattr(Batch, "padded", keep)
    monkeypatch.setattr(Trainer, "_report", count)
    return offsets, steps


def sharp(small_config: Callable[..., TrainingConfig], **changes: Any) -> TrainingConfig:
    """A run on CUDA that compiling changes by no more than rounding, and whose loss changes with the offsets."""
    model = small_config().model
    assert model is not None
    model.dropout = 0.0  # whose random numbers are others in a compiled graph
    settings = dict(model=model, learning_rate=1e-3, steps=12, batch_size=4, device="cuda", precision="fp32")
    return small_config(**{**settings, **changes})


@pytest.mark.parametrize("accumulation", [1, 3])
def test_replayed_steps_equal_eager_steps(
    accumulation: int,
    small_config: Callable[..., TrainingConfig],
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    offsets, steps = recorded
    train(sharp(small_config, accumulation=accumulation, out=str(tmp_path / "eager")))
    assert not offsets, "eager steps have their offsets on the CPU"
    train(sharp(small_config, accumulation=accumulation, out=str(tmp_path / "replayed"), compile=True))
    assert len(offsets) == 12 * accumulation
    assert steps[-1][2] > 0, "nothing was recorded: the graphs fell back to being launched by Python"
    expected = losses(tmp_path / "eager")
    assert losses(tmp_path / "replayed") == pytest.approx(expected, rel=1e-4)

    # The test would see offsets of another batch.
    batch_of = PackedBatches.__getitem__
    wrong = [0, 11, 64, 75, 128, 139, 192, 203, 256]
    monkeypatch.setattr(
        PackedBatches,
        "__getitem__",
        lambda self, step: batch_of(self, step)._replace(cu_seqlens=torch.tensor(wrong)),
    )
    train(sharp(small_config, accumulation=accumulation, out=str(tmp_path / "wrong")))
    assert losses(tmp_path / "wrong") != pytest.approx(expected, rel=5e-4)


def test_new_boundaries_compile_and_record_nothing(
    small_config: Callable[..., TrainingConfig], recorded: Recorded, tmp_path: Path
):
    """The model is compiled once, and forward and backward are recorded for every number of segments.

    A number of segments is warmed up when it is first met, and recorded the next time. Validations in between are not
    recorded and disturb nothing.
    """
    train(sharp(small_config, out=str(tmp_path / "run"), compile=True, steps=30))
    offsets, steps = recorded
    met: Counter[int] = Counter()
    settled = 0
    for step, segments in enumerate(map(len, offsets)):
        met[segments] += 1
        if met[segments] <= 2:
            settled = step
    later = {tuple(x) for x in offsets[settled + 1 :]}
    assert len(met) == 2
    assert len(later) > 5, "boundaries must change in the steps that are looked at"
    assert len({compiled for compiled, _, _ in steps}) == 1, f"a later step was compiled anew: {steps}"
    assert steps[-1][2] > 0, "nothing was recorded: the graphs fell back to being launched by Python"
    assert len(set(steps[settled:])) == 1, f"a graph was recorded after step {settled + 1}: {steps}"


def test_a_replayed_run_resumes(small_config: Callable[..., TrainingConfig], tmp_path: Path):
    """CUDA graphs are captured again, and the weights equal those of the checkpoint."""
    config = sharp(small_config, out=str(tmp_path / "whole"), compile=True)
    train(config)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000012")
    resume(tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_stopped_run_resumes(
    small_config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fused optimiser's state and dropout's seeds survive; sums on a GPU may differ in their last bits."""
    train(small_config(out=str(tmp_path / "whole"), device="cuda"))
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(out=str(tmp_path / "parts"), device="cuda"))
    resume(tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    assert load_model(tmp_path / "parts", device="cpu").vocab_size == 257


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(
    parallel: str, compiled: bool, small_config: Callable[..., TrainingConfig], tmp_path: Path
):
    gentle = dict(learning_rate=1e-4, ema=0.5)
    alone = sharp(small_config, **gentle, accumulation=2, out=str(tmp_path / "alone"))
    train(alone)
    config = sharp(small_config, **gentle, out=str(tmp_path / "two"), parallel=parallel, compile=compiled)
    together(2, train_silently, config)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def train_silently(config: TrainingConfig) -> None:
    train(config)
