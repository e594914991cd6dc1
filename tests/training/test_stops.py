"""Signals that ask a run to stop, at any moment of it."""

import os
import signal
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.training import Terminated, TrainingConfig, TrainingInterrupted, resume, terminable, train
from resolvent.training.checkpoint import load_trainer_state
from resolvent.training.interrupt import STOPPING, StopRequest
from resolvent.training.progress import TrainingDisplay
from resolvent.training.trainer import Trainer

from .runs import after_step, assert_same_run, metrics

MakeConfig = Callable[..., TrainingConfig]


def stop_in_validation(monkeypatch: pytest.MonkeyPatch, validation: int, number: int) -> list[int]:
    """Send a signal in the first call of the model in a validation, counted from 1; the calls of that validation."""
    validate, forward = Trainer._validate, Phase2IntegratedModel.forward
    validations, calls = [0], [0]

    def counted(self: Trainer, *arguments: Any, **options: Any) -> Any:
        validations[0] += 1
        return validate(self, *arguments, **options)

    def stopping(self: Phase2IntegratedModel, *arguments: Any, **options: Any) -> Any:
        if not self.training and validations[0] == validation and "labels" in options:
            calls[0] += 1
            if calls[0] == 1:
                os.kill(os.getpid(), number)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "_validate", counted)
    monkeypatch.setattr(Phase2IntegratedModel, "forward", stopping)
    return calls


def one_document(tmp_path: Path, config: TrainingConfig) -> str:
    """A text whose validation takes several calls of the model."""
    path = tmp_path / "long.txt"
    text = Path(str(config.data)).read_text(encoding="utf-8").replace("<|endoftext|>", "")
    path.write_text(text * 6, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_stops_a_validation_which_resume_repeats(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    config = small_config(eval_tokens=0, out=str(tmp_path / "whole"))
    config.data = one_document(tmp_path, config)
    train(config)
    config.out = str(tmp_path / "parts")
    with monkeypatch.context() as patch:
        calls = stop_in_validation(patch, 2, number)
        with pytest.raises(TrainingInterrupted) as stop:
            train(config)
    assert calls == [1]
    assert metrics(tmp_path / "whole")[-1]["validation_tokens"] > 3 * 512  # which takes four
    assert (stop.value.signal_number, stop.value.step) == (number, 6)
    assert [record["step"] for record in metrics(tmp_path / "parts") if "validation_loss" in record] == [3]
    assert load_trainer_state(tmp_path / "parts" / "checkpoints" / "step-00000006").validation_due

    def kill() -> None:
        raise RuntimeError("killed")

    after_step(monkeypatch, 7, kill)  # before the checkpoint of step 8: back to step 6, whose validation is made again
    with pytest.raises(RuntimeError, match="killed"):
        resume(tmp_path / "parts")
    assert [record["step"] for record in metrics(tmp_path / "parts") if "validation_loss" in record] == [3, 6]
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 10)


def test_signal_stops_the_last_validation_which_resume_repeats(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(small_config(out=str(tmp_path / "whole")))
    for number in (signal.SIGINT, signal.SIGHUP):
        run = tmp_path / f"stopped-{number}"
        with monkeypatch.context() as patch, terminable():
            stop_in_validation(patch, 4, number)
            with pytest.raises(KeyboardInterrupt) as stop:
                train(small_config(out=str(run)))
        assert number == (stop.value.signal_number if isinstance(stop.value, Terminated) else signal.SIGINT)
        resume(run)
        assert_same_run(tmp_path / "whole", run, 10)


@pytest.mark.parametrize("number", STOPPING)
def test_ignored_signal_stays_ignored(number: int):
    """As `nohup` does with SIGHUP, and shells with SIGINT of what runs in the background."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with terminable(), StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN
        assert stop.signal_number is None
    finally:
        signal.signal(number, previous)


def test_second_hangup_is_ignored(monkeypatch: pytest.MonkeyPatch):
    """The terminal sends one, and the shell passes it on."""
    hung_up: list[int] = []
    with terminable():
        with StopRequest(lambda: hung_up.append(1)) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGHUP
        assert hung_up
        with pytest.raises(Terminated) as raised:
            os.kill(os.getpid(), signal.SIGHUP)
    assert raised.value.signal_number == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


class Terminal(StringIO):
    """A terminal that may be closed."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_closed_terminal_does_not_prevent_saving():
    terminal = Terminal()
    display = TrainingDisplay(Console(file=terminal), steps=3, first_step=0, log_interval=1)
    with display:
        terminal.gone = True
        with pytest.raises(OSError, match="Input/output"):
            display.say("text")
        display.hang_up()
        display.say("text")
        with display.validating(10) as advance:
            advance(5)
    display.say("text")


def test_long_validation_prints_progress(monkeypatch: pytest.MonkeyPatch):
    output, ticks = StringIO(), iter(range(0, 1000, 10))
    monkeypatch.setattr("resolvent.training.progress.time.monotonic", lambda: float(next(ticks)))
    display = TrainingDisplay(Console(file=output, width=60), steps=3, first_step=0, log_interval=1)
    with display.validating(4000) as advance:
        for _ in range(4):
            advance(1000)
    assert output.getvalue().splitlines() == [
        "validation: 2,000 of 4,000 tokens  ETA 0:20",
        "validation: 4,000 of 4,000 tokens  ETA 0:00",
    ]


def test_a_terminal_shows_a_bar_of_a_validation():
    output = Terminal()
    display = TrainingDisplay(Console(file=output, width=100), steps=3, first_step=0, log_interval=1)
    with display, display.validating(4000) as advance:
        advance(1000)
        time.sleep(0.3)  # the bar is drawn ten times a second
    assert "validation 1000/4000" in output.getvalue()
    assert "ETA 0:00" in output.getvalue()
