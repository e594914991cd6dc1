"""Harness of a benchmark: entries measured one after the other, with their failures."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import psutil
import torch
from rich.console import Console

from resolvent.benchmark.report import Row, Target
from resolvent.benchmark.timing import Ceilings, Work
from resolvent.errors import ResolventError
from resolvent.terminal import say

Scale = Literal["cuda", "cpu", "quick"]
Check = Callable[[float], None]
_NOTABLE_SHARE = 0.05
"""Share of the CPU used by other processes above which a measurement is unreliable."""


class WrongResultError(ResolventError, ArithmeticError):
    """Error of an entry whose result differs from its reference."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a comparison: the figures of the entries, and the errors of entries without a figure.

    Attributes:
        figures: result of each entry's measurement; ours under ``ours``.
        error: our relative error to the reference.
        failures: one line per entry without a figure.
    """

    figures: dict[str, Any]
    error: float | None
    failures: dict[str, str]

    def part(self, index: int) -> "Outcome":
        """Return the outcome of one figure, if each measurement returned several."""
        return dataclasses.replace(self, figures={name: figure[index] for name, figure in self.figures.items()})

    @property
    def ours(self) -> Any:
        """Our figure; None if there is none."""
        return self.figures.get("ours")

    @property
    def peers(self) -> dict[str, Any]:
        """Figures of the peers."""
        return {name: figure for name, figure in self.figures.items() if name != "ours"}


class Measurement(NamedTuple):
    """Case of a section, which can be measured alone.

    Attributes:
        section: section of the benchmark.
        name: name of the case.
        measure: measures the case and adds one or several rows.
    """

    section: str
    name: str
    measure: "Callable[[Bench], object]"


@dataclass
class Bench:
    """State that all sections share.

    Attributes:
        device: the device.
        scale: name of the set of sizes.
        ceilings: limits of the machine.
        compiled: whether our model is compiled wherever the peers are.
        console: console that shows progress.
        rows: results so far.
        on_row: called after every new row.
        place: number of the measurement in progress and of all, such as ``7/22``.
    """

    device: torch.device
    scale: Scale
    ceilings: Ceilings
    compiled: bool
    console: Console
    rows: list[Row] = field(default_factory=list)
    on_row: Callable[[], None] | None = None
    place: str = ""
    started: float = field(default_factory=time.perf_counter)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation: half precision on CUDA, float32 elsewhere."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, message: str) -> None:
        say(self.console, f"{time.perf_counter() - self.started:4.0f} s {self.place} {message}", style="dim")

    def measure(
        self,
        name: str,
        ours: Callable[[Check], Any],
        peers: Mapping[str, Callable[[], Any]] | None = None,
        *,
        tolerance: float = 0.0,
    ) -> Outcome:
        """Measure ours and the peers, one after the other.

        Args:
            name: name of the measurement.
            ours: measures ours. It first calls its argument with the relative error of its result, which raises a
                ``WrongResultError`` if the error is above ``tolerance``.
            peers: functions that measure the peers.
            tolerance: see ``ours``.
        """
        figures, failures, errors = {}, {}, []

        def check(error: float) -> None:
            errors.append(error)
            if not error <= tolerance:
                raise WrongResultError(f"relative error {error:.1e}, allowed is {tolerance:.0e}: not measured")

        for who, measure in {"ours": partial(ours, check), **(peers or {})}.items():
            self.say(f"{name}: {who}")
            try:
                self._clear()
                with self._watching_others(name):
                    figures[who] = measure()
            except Exception as problem:
                if os.environ.get("RESOLVENT_DEBUG"):
                    raise
                failures[who] = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
                self.say(f"{name}: {who} failed: {failures[who]}")
        return Outcome(figures, max(errors, default=None), failures)

    def add(
        self,
        section: str,
        name: str,
        unit: str,
        outcome: Outcome,
        *,
        target: Target | None = None,
        work: Work | None = None,
        seconds: float | None = None,
    ) -> Row:
        """Add a row to the report.

        Args:
            section: see ``Row``.
            name: see ``Row``.
            unit: see ``Row``.
            outcome: of the comparison, with one figure per entry.
            target: see ``Row``.
            work: least work of a call.
            seconds: time of a call of ours; needed with ``work`` unless the unit is ms.
        """
        if unit == "ms" and outcome.ours is not None:
            seconds = outcome.ours / 1000
        fraction = None if work is None or seconds is None else work.fraction(seconds, self.ceilings)
        row = Row(
            section,
            name,
            unit,
            outcome.ours,
            peers=outcome.peers,
            target=target,
            work=work,
            fraction=fraction,
            error=outcome.error,
            failures=outcome.failures,
        )
        return self._append(row)

    def add_figure(self, section: str, name: str, unit: str, figure: float, target: Target | None = None) -> None:
        """Add a row of a figure without peers."""
        self._append(Row(section, name, unit, figure, target=target))

    def find(self, section: str, name: str) -> Row | None:
        """Return the row of that name; None if it was not measured."""
        return next((row for row in self.rows if (row.section, row.name) == (section, name)), None)

    def _append(self, row: Row) -> Row:
        self.rows.append(row)
        if self.on_row is not None:
            self.on_row()
        return row

    @contextmanager
    def _watching_others(self, name: str) -> Iterator[None]:
        """Warn if other processes slow down a measurement on the CPU whose figure means something."""
        started, others = time.perf_counter(), cpu_seconds_of_others()
        yield
        share = (cpu_seconds_of_others() - others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
        if self.device.type == "cpu" and self.scale != "quick" and share > _NOTABLE_SHARE:
            self.say(f"{name}: other processes used {share:.0%} of the CPU meanwhile: measure again when it is idle")

    def _clear(self) -> None:
        """Free the memory and the caches of the previous entry."""
        gc.collect()
        if self.device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def cpu_seconds_of_others() -> float:
    """Return the time that the processors spent so far outside this process and its finished children."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
    return busy - own.user - own.system - own.children_user - own.children_system
