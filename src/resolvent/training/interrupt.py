"""Signals that stop training after the current step, with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, `kill`, and the end of the terminal or of the connection to it. Windows has no SIGHUP: there, a terminal that
is closed ends the process, and the run goes on from its last checkpoint."""

HANGUP: int | None = getattr(signal, "SIGHUP", None)


class TrainingInterrupted(BaseException):
    """A signal stopped training, after a checkpoint was saved. Like KeyboardInterrupt, this is not an error.

    Attributes:
        signal_number: the signal, such as `signal.SIGINT`.
        run_dir: the run folder to resume.
        step: the step of its last checkpoint.
    """

    def __init__(self, signal_number: int, run_dir: Path, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; saved in {run_dir}")
        self.signal_number, self.run_dir, self.step = signal_number, run_dir, step


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP at a moment when no step can be finished first.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def _handled(*numbers: int) -> list[int]:
    """Return the signals that this thread can handle and that are not ignored; `nohup` ignores SIGHUP."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        return []
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP within the block raise `Terminated`, as SIGINT raises KeyboardInterrupt."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    numbers = _handled(*(number for number in STOPPING if number != signal.SIGINT))
    previous = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Keeps the first signal of `STOPPING` within a `with` block in `signal_number`.

    A second SIGINT or SIGTERM acts as without this block. A second SIGHUP does nothing: it often comes twice, since
    shells pass on the SIGHUP of the terminal.

    Args:
        hang_up: called at a SIGHUP, after which nothing can be shown on the terminal.
    """

    def __init__(self, hang_up: Callable[[], None] | None = None) -> None:
        self.signal_number: int | None = None
        self._hang_up = hang_up
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._keep) for number in _handled(*STOPPING)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore(*self._previous)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        if number == HANGUP and self._hang_up is not None:
            self._hang_up()
        self._restore(*(number for number in self._previous if number != HANGUP))

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._previous.pop(number))
