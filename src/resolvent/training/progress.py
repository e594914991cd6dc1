"""Progress of training: a live line in a terminal, plain lines at intervals elsewhere."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from resolvent.evaluation import LanguageScore
from resolvent.evaluation.scoring import Advance
from resolvent.terminal import say
from resolvent.wording import counted

_TIMED_STEPS = 50
"""Newest steps whose median time is shown."""
_SECONDS_BETWEEN_LINES = 15.0
"""Seconds between two lines of a validation if the output is no terminal."""


def frozen_part(parameters: int, trained: int) -> str:
    """Return a note on the parameters that are not trained; "" where all are."""
    return "" if trained == parameters else f" ({parameters - trained:,} frozen)"


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds, such as 1:02:03 or 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingDisplay:
    """Progress display of a run on a console, within a `with` block.

    Args:
        console: the console; a terminal shows a progress bar, other outputs a line every `log_interval` steps.
        steps: steps of the whole run.
        first_step: steps before this process.
        log_interval: steps between two plain lines.
        warm_up: first steps of this process, which compile: their time is not shown, and does not count.
        most_tokens_per_second: speed at which the devices would do nothing but the arithmetic of the model, of which
            the part that is reached is shown (model FLOPs utilisation, MFU); None if it is not known.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        first_step: int,
        log_interval: int,
        warm_up: int = 0,
        most_tokens_per_second: float | None = None,
    ) -> None:
        self.console = console
        self._steps, self._log_interval = steps, log_interval
        self._shown = {first_step + 1, steps}
        self._most_tokens_per_second = most_tokens_per_second
        self._slow = first_step + warm_up
        self._seconds = deque[float](maxlen=_TIMED_STEPS)
        self._hung_up = False
        self._bar = Progress(
            TextColumn("{task.description}{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # gives way to the numbers
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=first_step, status="")
        self._validation = self._bar.add_task("validation ", visible=False, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._written():
            self._bar.stop()

    def step(
        self, step: int, *, loss: float, bits_per_byte: float, learning_rate: float, tokens: int, seconds: float
    ) -> None:
        """Show a finished step, with the smoothed loss; `tokens` and `seconds` are those of the step.

        The learning rate is that of AdamW: Muon's is the same multiple of it in every step.
        """
        speed, eta = "", ""
        if step > self._slow:
            self._seconds.append(seconds)
            usual = statistics.median(self._seconds)
            speed, eta = self._speed(tokens / usual), f"  ETA {format_duration(usual * (self._steps - step))}"
        status = f"loss {loss:.3f}  {bits_per_byte:.3f} bits/byte  {speed}lr {learning_rate:.1e}{eta}"
        self._bar.update(self._task, completed=step, status=status)
        if not self.console.is_terminal and (step % self._log_interval == 0 or step in self._shown):
            self.say(f"{self._position(step)}  {status}")

    def _speed(self, tokens_per_second: float) -> str:
        part = tokens_per_second / self._most_tokens_per_second if self._most_tokens_per_second else None
        return f"{tokens_per_second:,.0f} tokens/s  {'' if part is None else f'{part:.1%} MFU  '}"

    @contextmanager
    def validating(self, tokens: int) -> Iterator[Advance]:
        """Yield a function that takes a number of validated tokens and shows progress and remaining time."""
        task = self._validation
        self._bar.update(task, total=tokens, completed=0, status="", visible=True)
        done, started = 0, time.monotonic()
        said = started

        def advance(read: int) -> None:
            nonlocal done, said
            done, now = done + read, time.monotonic()
            status = f"ETA {format_duration((now - started) * (tokens / done - 1))}" if done else ""
            self._bar.update(task, completed=done, status=status)
            if not self.console.is_terminal and now - said > _SECONDS_BETWEEN_LINES:
                said = now
                self.say(f"validation: {done:,} of {counted(tokens, 'token')}  {status}")

        try:
            yield advance
        finally:
            self._bar.update(task, visible=False)

    def validation(self, step: int, score: LanguageScore, averaged: LanguageScore | None) -> None:
        """Show a validation of the weights, and of their moving average where there is one."""
        ema = "" if averaged is None else f"; EMA: loss {averaged.loss:.4f}, {averaged.bits_per_byte:.4f} bits/byte"
        self.say(
            f"{self._position(step)}  validation: loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits/byte "
            f"on {counted(score.tokens, 'token')}{ema}"
        )

    def say(self, text: str) -> None:
        """Show a line of text without markup."""
        with self._written():
            say(self.console, text)

    def hang_up(self) -> None:
        """Ignore errors of the output from now on: the terminal may be closed."""
        self._hung_up = True

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if not self._is_hung_up():
                raise
            self.console.quiet = True  # a closed terminal must not keep the run from saving

    def _is_hung_up(self) -> bool:
        # A separate function: Python runs a pending signal handler when a function is called.
        return self._hung_up

    def _position(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"
