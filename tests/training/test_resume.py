"""Runs that are finished, that go on for more steps, that are replaced, and what is read of them."""

import os
import shutil
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from resolvent.errors import CheckpointError, ConfigError
from resolvent.runs import load_trained
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.checkpoint import find_checkpoint
from resolvent.training.run_folder import read_run
from resolvent.training.trainer import Trainer

from .runs import after_step, assert_same_run, contents, metrics

MakeConfig = Callable[..., TrainingConfig]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, config: TrainingConfig) -> Path:
    """Begin a run that is interrupted after a step."""
    after_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(config)
    return config.run_dir


def forbid_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_validate", lambda *_, **__: pytest.fail("validated"))


# --- finished runs ---------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_validated_again(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result, output = train(small_config()), StringIO()
    before = contents(tmp_path / "run")
    forbid_validations(monkeypatch)
    for _ in range(2):
        again = resume(tmp_path / "run", data="moved.txt", console=Console(file=output))
        assert again.validation == result.validation
        assert contents(tmp_path / "run") == before
        assert not again.model.training
        assert again.tokenizer.to_str() == result.tokenizer.to_str()
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name
    message = f"The run in {tmp_path / 'run'} is finished: step 10 of 10, validation loss {result.validation.loss:.4f}"
    assert message in output.getvalue()
    assert "--steps N, N more than 10" in output.getvalue()


def test_a_run_without_a_result_is_validated_again(small_config: MakeConfig, tmp_path: Path):
    result = train(small_config())
    before = contents(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert resume(tmp_path / "run").validation == result.validation
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("file", ["result.json", "metrics.jsonl"])
def test_changed_score_is_measured_again(small_config: MakeConfig, tmp_path: Path, file: str):
    result = train(small_config())
    path = tmp_path / "run" / file
    lines = path.read_text()
    path.write_text(lines.replace(f"{result.validation.loss}", f"{result.validation.loss / 2}"))
    assert path.read_text() != lines
    assert resume(tmp_path / "run").validation == result.validation


def test_weights_of_a_finished_run_are_restored_from_its_checkpoint(small_config: MakeConfig, tmp_path: Path):
    train(small_config())
    weights = tmp_path / "run" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    resume(tmp_path / "run")
    assert weights.read_bytes() == content


# --- more steps ------------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_with_more_steps(small_config: MakeConfig, tmp_path: Path):
    train(small_config(warmup_steps=2, learning_rate=0.01))
    first, output = metrics(tmp_path / "run"), StringIO()
    resume(tmp_path / "run", steps=20, console=Console(file=output, width=200))
    records = metrics(tmp_path / "run")
    assert records[: len(first) - 1] == first[:-1]  # but for the validation at the end
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert records[-1]["final"]
    assert records[-1]["step"] == 20
    stretched = small_config(steps=20, warmup_steps=2)
    assert [record["lr"] for record in steps[10:]] == [0.01 * stretched.rate_factor(step) for step in range(10, 20)]
    assert steps[9]["lr"] == pytest.approx(0.001)
    after = f"{stretched.rate_factor(10):.0%}"
    assert (
        "20 instead of 10: the cosine schedule is stretched to them; the learning rate goes from 10% of its peak, in "
        f"step 10, to {after}"
    ) in output.getvalue()
    assert read_run(tmp_path / "run")[0].steps == 20
    assert resume(tmp_path / "run").validation.loss == records[-1]["validation_loss"]


@pytest.mark.parametrize("steps", [7, 14])
def test_another_number_of_steps_is_kept_when_the_run_is_killed(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    """The learning rate is constant: a run that was started with that number is the same."""

    def kill() -> None:
        raise RuntimeError("killed")

    constant = dict(schedule="constant", warmup_steps=0)
    train(small_config(out=str(tmp_path / "whole"), steps=steps, **constant))
    stop_after(monkeypatch, 5, small_config(**constant))
    after_step(monkeypatch, 6, kill)
    with pytest.raises(RuntimeError, match="killed"):
        resume(tmp_path / "run", steps=steps)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run", steps)


def test_fewer_steps_than_were_taken_are_refused(small_config: MakeConfig, tmp_path: Path):
    train(small_config())
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"has taken 10 steps: steps must be >= 10, got 9"):
        resume(tmp_path / "run", steps=9)
    assert contents(tmp_path / "run") == before


def test_a_damaged_number_of_steps_is_found(small_config: MakeConfig, tmp_path: Path):
    train(small_config())
    resume(tmp_path / "run", steps=12)
    path = tmp_path / "run" / "steps.json"
    path.write_text(path.read_text().replace("12", "92"))
    with pytest.raises(CheckpointError, match=r"steps\.json is not what was saved"):
        resume(tmp_path / "run")


# --- runs that are replaced ------------------------------------------------------------------------------------------


def test_overwrite_replaces_a_run(small_config: MakeConfig, tmp_path: Path):
    run = tmp_path / "run"
    train(small_config(seed=1, tracker="tensorboard"))
    resume(run, steps=12)
    (run / "notes.txt").write_text("mine")
    train(small_config(out=str(tmp_path / "fresh"), seed=2))
    with pytest.raises(ConfigError, match=r"continue its run with --resume .*run, replace it with --overwrite, or"):
        train(small_config(seed=2))
    train(small_config(seed=2), overwrite=True)
    assert_same_run(run, tmp_path / "fresh", 10)
    assert contents(run).keys() == contents(tmp_path / "fresh").keys() | {"notes.txt"}


def test_a_run_is_kept_until_the_one_that_replaces_it_can_begin(small_config: MakeConfig, tmp_path: Path):
    train(small_config())
    before = contents(tmp_path / "run")
    with pytest.raises(Exception, match=r"missing\.txt"):
        train(small_config(data=str(tmp_path / "missing.txt")), overwrite=True)
    assert contents(tmp_path / "run") == before


def foreign(folder: Path, kind: str) -> None:
    """A folder with files of names that a run has."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "mine").write_text("mine")
    if kind != "no manifest":
        (folder / "manifest.json").write_text('{"name": "A web page", "icons": []}')
    if kind != "no record":
        (folder / "training.json").write_text('{"epochs": 3}')


@pytest.mark.parametrize("kind", ["no manifest", "no record", "both"])
def test_overwrite_removes_only_runs(small_config: MakeConfig, tmp_path: Path, kind: str):
    foreign(tmp_path / "run", kind)
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match="what it holds is no run: choose another one with --out"):
        train(small_config(), overwrite=True)
    assert contents(tmp_path / "run") == before


def test_overwrite_follows_no_links(small_config: MakeConfig, tmp_path: Path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(small_config())
    run.rename(elsewhere)
    run.symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(ConfigError, match="is a link, which --overwrite does not follow"):
        train(small_config(), overwrite=True)
    assert contents(elsewhere) == before

    run.unlink()
    elsewhere.rename(run)
    (run / "checkpoints").rename(elsewhere)
    (elsewhere / "tensorboard").mkdir()
    (elsewhere / "tensorboard" / "mine").write_text("mine")
    (run / "checkpoints").symlink_to(elsewhere)
    (run / "tensorboard").symlink_to(elsewhere / "tensorboard")
    (run / "metrics.jsonl").rename(elsewhere / "metrics.jsonl")
    (run / "metrics.jsonl").symlink_to(elsewhere / "metrics.jsonl")
    before = contents(elsewhere)
    train(small_config(seed=3), overwrite=True)
    assert contents(elsewhere) == before
    assert not (run / "checkpoints").is_symlink()
    assert find_checkpoint(run)[0] == run / "checkpoints" / "step-00000010"


def test_error_of_a_run_without_checkpoint_names_the_remedy(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill() -> None:
        raise RuntimeError("killed")

    run = tmp_path / "run"
    after_step(monkeypatch, 2, kill)
    with pytest.raises(RuntimeError, match="killed"):
        train(small_config())
    with pytest.raises(CheckpointError, match=rf"before its first checkpoint\. Begin it again with: .*--resume {run}"):
        load_trained(run, "cpu")
    with pytest.raises(ConfigError, match=r"was stopped before its first checkpoint, with --resume .* --overwrite, or"):
        train(small_config())
    train(small_config(out=str(tmp_path / "whole")))
    train(small_config(), overwrite=True)
    assert_same_run(run, tmp_path / "whole", 10)


# --- results ---------------------------------------------------------------------------------------------------------


def test_history_equals_the_metrics(small_config: MakeConfig, tmp_path: Path):
    result = train(small_config())
    history, records = result.history, metrics(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    assert [step.step for step in history.steps] == list(range(1, 11))
    for name in ("tokens", "loss", "bits_per_byte", "lr", "grad_norm"):
        assert [getattr(step, name) for step in history.steps] == [record[name] for record in steps]
    assert all(step.tokens_per_second > 0 for step in history.steps)
    assert [(each.step, each.final) for each in history.validations] == [(3, False), (6, False), (9, False), (10, True)]
    last = history.validations[-1]
    assert (last.loss, last.bits_per_byte, last.tokens) == (
        result.validation.loss,
        result.validation.bits_per_byte,
        result.validation.tokens,
    )
    assert repr(history) == "History(10 steps, 4 validations)"


@pytest.mark.parametrize("line", ['{"step": 3, "loss": 1.0}\n', "[3]\n", "{\n", '{"validation_loss": 3}\n'])
def test_a_damaged_history_is_named(small_config: MakeConfig, tmp_path: Path, line: str):
    result = train(small_config(steps=1))
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + line.strip())
    assert len(result.history.steps) == 1, "a run that goes on is writing its last line"
    path.write_text(whole + line)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl holds a line that is no record"):
        _ = result.history
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the metrics of the run: .*metrics\.jsonl"):
        _ = result.history


# --- longer wsd runs -------------------------------------------------------------------------------------------------


STABLE = dict(schedule="wsd", warmup_steps=2, decay_fraction=0.3, keep_checkpoints=1, learning_rate=0.01)


def test_a_longer_wsd_run_goes_on_from_before_the_decay(small_config: MakeConfig, tmp_path: Path):
    """It is the run that was started with that number of steps, bit for bit."""
    train(small_config(out=str(tmp_path / "whole"), steps=20, **STABLE))
    train(small_config(**STABLE))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000007", "step-00000010"]
    output = StringIO()
    resume(tmp_path / "run", steps=20, console=Console(file=output, width=10_000))
    assert_same_run(tmp_path / "whole", tmp_path / "run", 20)
    assert "back to step 7, the last before the decay of the learning rate, and on at its peak" in output.getvalue()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000014", "step-00000020"]


def test_fewer_steps_shorten_the_schedule(small_config: MakeConfig, tmp_path: Path):
    train(small_config(checkpoint_interval=7))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    output = StringIO()
    resume(tmp_path / "run", steps=9, console=Console(file=output, width=10_000))
    assert "9 instead of 10: the cosine schedule is shortened to them; the learning rate goes from" in output.getvalue()


def test_a_wsd_run_without_that_checkpoint_says_what_its_rate_does(small_config: MakeConfig, tmp_path: Path):
    train(small_config(**STABLE))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000007")
    output = StringIO()
    resume(tmp_path / "run", steps=20, console=Console(file=output, width=10_000))
    message = "the wsd schedule is stretched to them; the learning rate goes from 10% of its peak, in step 10, to 100%"
    assert message in output.getvalue()


def test_a_longer_wsd_run_that_is_killed_on_its_way_back_is_whole(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(small_config(out=str(tmp_path / "whole"), **STABLE))
    train(small_config(**STABLE))

    def kill(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("resolvent.training.run.write_steps", kill)
        with pytest.raises(RuntimeError, match="killed"):
            resume(tmp_path / "run", steps=20)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 10)


def test_a_shorter_wsd_run_stays_where_it_is(small_config: MakeConfig, tmp_path: Path):
    train(small_config(**STABLE))
    with pytest.raises(ConfigError, match="has taken 10 steps: steps must be >= 10, got 9"):
        resume(tmp_path / "run", steps=9)
    assert resume(tmp_path / "run", steps=10).run_dir == tmp_path / "run"
