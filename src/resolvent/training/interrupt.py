"""Ctrl-C and SIGTERM during training: finish the step, save, then stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self


class TrainingInterrupted(BaseException):
    """Training was asked to stop, and has saved itself. Like KeyboardInterrupt, this is not an error.

    Attributes:
        signal_number: the signal that asked, such as `signal.SIGINT`.
        run_dir: the run folder to resume.
        step: the step of its last checkpoint.
    """

    def __init__(self, signal_number: int, run_dir: Path, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; saved in {run_dir}")
        self.signal_number, self.run_dir, self.step = signal_number, run_dir, step


class Terminated(KeyboardInterrupt):
    """SIGTERM at a moment when no step can be finished first."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM within the block raise `Terminated`, as SIGINT raises KeyboardInterrupt."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Keeps the first SIGINT or SIGTERM within a `with` block in `signal_number`; a second one acts as ever."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
