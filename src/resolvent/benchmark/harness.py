"""A benchmark in progress: entries measured one after the other, with their failures."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

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
"""Share of the CPU, taken by other processes, that spoils a measurement."""


class WrongResultError(ResolventError, ArithmeticError):
    """What is to be timed computes something else than its reference."""


@dataclass(frozen=True)
class Outcome:
    """What a contest gave: figures of all who could be measured, and why the others could not.

    Attributes:
        figures: whatever each entry's measurement returned; ours under ``ours``.
        error: ours, relative to the reference.
        failures: a line for each of the others.
    """

    figures: dict[str, Any]
    error: float | None
    failures: dict[str, str]

    def part(self, index: int) -> "Outcome":
        """The same for one of several figures that each measurement returned together."""
        return dataclasses.replace(self, figures={name: figure[index] for name, figure in self.figures.items()})

    @property
    def ours(self) -> Any:
        """Our figure, or None."""
        return self.figures.get("ours")

    @property
    def peers(self) -> dict[str, Any]:
        """The others' figures."""
        return {name: figure for name, figure in self.figures.items() if name != "ours"}


@dataclass
class Bench:
    """What all sections share.

    Attributes:
        device: where to compute.
        scale: whose sizes to take.
        ceilings: what the machine can do.
        compiled: whether our model is compiled where the peers are.
        console: where to say what is going on.
        rows: what was found so far.
    """

    device: torch.device
    scale: Scale
    ceilings: Ceilings
    compiled: bool
    console: Console
    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: half precision on CUDA, float32 elsewhere."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, message: str) -> None:
        say(self.console, f"{time.perf_counter() - self.started:4.0f} s {message}", style="dim")

    def compete(
        self,
        name: str,
        ours: Callable[[Check], Any],
        peers: Mapping[str, Callable[[], Any]] | None = None,
        *,
        tolerance: float = 0.0,
    ) -> Outcome:
        """Measure ours and the peers, one after the other.

        Args:
            name: what is measured.
            ours: measures ours. Before it does, it calls what it is given with the relative error of what it is about
                to measure, which raises a ``WrongResultError`` unless that is at most ``tolerance``.
            peers: each measures a peer.
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
        """A row of the report.

        Args:
            section: see ``Row``.
            name: see ``Row``.
            unit: see ``Row``.
            outcome: of the contest, with one figure for each entry.
            target: see ``Row``.
            work: what a call has to do at least.
            seconds: time of a call of ours; needed with ``work`` unless the unit is ms.
        """
        if unit == "ms" and outcome.ours is not None:
            seconds = outcome.ours / 1000
        fraction = None if work is None or seconds is None else work.fraction(seconds, self.ceilings)
        found = (outcome.ours, outcome.peers, target, work, fraction, outcome.error, outcome.failures)
        self.rows.append(Row(section, name, unit, *found))
        return self.rows[-1]

    def add_figure(self, section: str, name: str, unit: str, figure: float, target: Target | None = None) -> None:
        """A row of a figure that stands alone."""
        self.rows.append(Row(section, name, unit, figure, target=target))

    @contextmanager
    def _watching_others(self, name: str) -> Iterator[None]:
        """Say so where other processes slow a measurement on the CPU."""
        started, others = time.perf_counter(), cpu_seconds_of_others()
        yield
        share = (cpu_seconds_of_others() - others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
        if self.device.type == "cpu" and share > _NOTABLE_SHARE:
            self.say(f"{name}: other processes used {share:.0%} of the CPU meanwhile: measure again when it is idle")

    def _clear(self) -> None:
        """Nobody shall pay for what the one before left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def cpu_seconds_of_others() -> float:
    """Return the time that the processors spent so far on anything but this process and its finished children."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
    return busy - own.user - own.system - own.children_user - own.children_system
