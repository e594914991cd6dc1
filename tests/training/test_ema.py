"""The moving average of the weights: validated, saved, and resumed to the bit."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resolvent.data import load_tokenizer
from resolvent.errors import CheckpointError
from resolvent.evaluation import evaluate_documents
from resolvent.models import load_model
from resolvent.runs import load_trained
from resolvent.tensors import read_tensors
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.corpus import split_corpus
from resolvent.training.ema import WeightAverage
from tests.processes import together

from .runs import after_step, assert_same_run, metrics, tensors

MakeConfig = Callable[..., TrainingConfig]


def averages(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "ema" / "model.safetensors")


def assert_same_averages(ours: Path, theirs: Path) -> None:
    mine, yours = averages(ours), averages(theirs)
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, yours[name]), name


def test_average_follows_the_weights():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.3)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.tensors["weight/ema"], expected)


def test_weights_and_averages_change_places_and_back():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.3)
    with torch.no_grad():
        model.weight.add_(1)
    weight, averaged = model.weight.detach().clone(), average.tensors["weight/ema"].clone()
    inside: list[Tensor] = []

    def use() -> None:
        with average.in_place():
            inside.append(model.weight.detach().clone())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert torch.equal(inside[0], averaged)
    assert torch.equal(model.weight, weight)
    assert torch.equal(average.tensors["weight/ema"], averaged)


def test_the_averaged_model_is_validated_and_saved(small_config: MakeConfig, tmp_path: Path):
    config = small_config(ema=0.8)
    result = train(config)
    assert result.ema_validation is not None
    model, _ = load_trained(tmp_path / "run" / "ema", "cpu")
    score = evaluate_documents(model, split_corpus(config)[1], load_tokenizer(tmp_path / "run"))
    assert result.ema_validation.loss == pytest.approx(score.loss, rel=1e-6)
    assert result.ema_validation.loss != result.validation.loss
    validations = result.history.validations
    assert validations[-1].ema_loss == result.ema_validation.loss
    assert all(validation.ema_bits_per_byte for validation in validations)


def test_the_average_changes_nothing_else(small_config: MakeConfig, tmp_path: Path):
    train(small_config(out=str(tmp_path / "plain")))
    train(small_config(ema=0.8))
    assert tensors(tmp_path / "plain", 10).keys() == tensors(tmp_path / "run", 10).keys()
    for name, tensor in tensors(tmp_path / "plain", 10).items():
        assert torch.equal(tensor, tensors(tmp_path / "run", 10)[name]), name
    plain, averaged = metrics(tmp_path / "plain"), metrics(tmp_path / "run")
    assert plain == [{k: v for k, v in record.items() if not k.startswith("ema_")} for record in averaged]
    assert not (tmp_path / "plain" / "ema").exists()


def test_a_stopped_run_resumes_the_average_bit_for_bit(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train(small_config(out=str(tmp_path / "whole"), ema=0.8))
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(ema=0.8))
    result = resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 10)
    assert_same_averages(tmp_path / "whole", tmp_path / "run")
    assert result.ema_validation == whole.ema_validation


def test_a_finished_run_writes_the_average_anew(small_config: MakeConfig, tmp_path: Path):
    result = train(small_config(ema=0.8))
    shutil.copytree(tmp_path / "run" / "ema", tmp_path / "copy" / "ema")
    (tmp_path / "run" / "ema" / "model.safetensors").unlink()
    assert resume(tmp_path / "run").ema_validation == result.ema_validation
    assert_same_averages(tmp_path / "copy", tmp_path / "run")


def test_a_damaged_average_is_found(small_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(small_config(ema=0.8))
    path = tmp_path / "run" / "checkpoints" / "step-00000010" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    resume(tmp_path / "run")
    assert "Going back to step-00000008" in caplog.text and "ema.safetensors" in caplog.text


def test_a_link_in_the_place_of_the_averaged_model_is_refused(small_config: MakeConfig, tmp_path: Path):
    train(small_config(ema=0.8))
    (tmp_path / "run" / "ema").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "ema").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link"):
        resume(tmp_path / "run", steps=12)


def begin(config: TrainingConfig) -> None:
    train(config)


def go_on(run: Path) -> None:
    resume(run)


@pytest.fixture
def alone(small_config: MakeConfig, tmp_path: Path) -> Path:
    return train(small_config(out=str(tmp_path / "alone"), steps=6, accumulation=2, **FIXED)).run_dir


FIXED = dict(ema=0.8, learning_rate=1e-4, keep_checkpoints=9)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_average_as_one(small_config: MakeConfig, tmp_path: Path, alone: Path, parallel: str):
    together(2, begin, small_config(steps=6, parallel=parallel, **FIXED))
    run, mine = tmp_path / "run", averages(alone)
    for name, tensor in averages(run).items():
        torch.testing.assert_close(tensor, mine[name], rtol=1e-4, atol=1e-5, msg=name)
    for one, two in zip(metrics(run), metrics(alone), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert load_model(run / "ema", device="cpu").vocab_size == 257

    # Resumed by two processes: the same bits. By one: the same but for the order of sums.
    for name, resumed in (("two", lambda parts: together(2, go_on, parts)), ("one", resume)):
        parts = tmp_path / name
        shutil.copytree(run, parts)
        shutil.rmtree(parts / "checkpoints" / "step-00000006")
        resumed(parts)
        for weight, tensor in averages(parts).items():
            exact = dict(rtol=0, atol=0) if name == "two" else dict(rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tensor, averages(run)[weight], **exact, msg=weight)
