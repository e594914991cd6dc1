"""Speed and memory: the figures of `resolvent benchmark`.

An entry is timed only after its result agrees with a float64 reference. Peers are measured in the same run, in their
fastest form, and every figure is compared with the limits of the machine: a large copy and a large matrix product.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console

from resolvent.benchmark import decoding, memory, operators, serving, training
from resolvent.benchmark.harness import Bench, Measurement, Scale, WrongResultError
from resolvent.benchmark.report import Report, Row, Target
from resolvent.benchmark.timing import keep_freed_memory, measure_ceilings
from resolvent.errors import ConfigError

__all__ = ["SECTIONS", "Benchmark", "Report", "Row", "Target", "WrongResultError", "select"]

SECTIONS: dict[str, Callable[[Scale], list[Measurement]]] = {
    module.SECTION: module.measurements for module in (operators, training, memory, decoding, serving)
}
"""Sections of the benchmark, in order."""


class Benchmark:
    """Run of the benchmark.

    Args:
        only: what to measure: see ``select``.
        device: the device, which decides sizes, dtype and peers.
        quick: tiny sizes, to check that it runs; the figures mean nothing.
        compiled: compile our model wherever the peer is compiled.
        console: console that shows progress; None shows nothing.

    Attributes:
        report: results so far.

    Raises:
        ConfigError: ``only`` names what there is not.
    """

    def __init__(
        self,
        only: Sequence[str],
        *,
        device: torch.device,
        quick: bool = False,
        compiled: bool = True,
        console: Console | None = None,
    ) -> None:
        scale: Scale = "quick" if quick else "cuda" if device.type == "cuda" else "cpu"
        self._measurements = select(only, scale)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if scale == "cpu":
            keep_freed_memory()
        ceilings = measure_ceilings(device, dtype, {"quick": 512, "cuda": 8192, "cpu": 2048}[scale])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        missing = [f"{section}: {name}" for section, name, _ in self._measurements]
        self.report = Report(scale, name, ceilings, missing=missing)
        self._bench = Bench(device, scale, ceilings, compiled, console or Console(quiet=True), self.report.rows)

    def measure(self, on_row: Callable[[Report], None] | None = None) -> None:
        """Measure, and call ``on_row`` with the report after every row."""
        if on_row is not None:
            self._bench.on_row = partial(on_row, self.report)
        for i, measurement in enumerate(self._measurements, start=1):
            self._bench.place = f"{i}/{len(self._measurements)}"
            measurement.measure(self._bench)
            del self.report.missing[0]


def select(only: Sequence[str], scale: Scale) -> list[Measurement]:
    """Return the measurements to make at a scale, each once.

    Args:
        only: names of sections, or ``SECTION:PART`` for the cases of a section whose name has PART between its commas,
            such as ``training:base-hybrid`` or ``training:B1 N65536``.
        scale: set of sizes.

    Raises:
        ConfigError: there is no such section or case.
    """
    chosen: dict[tuple[str, str], Measurement] = {}
    for item in only:
        section, _, part = item.partition(":")
        if section not in SECTIONS:
            raise ConfigError(f"{section!r} is none of {', '.join(SECTIONS)}.")
        cases = SECTIONS[section](scale)
        found = [case for case in cases if not part or part in case.name.split(", ")]
        if not found:
            names = "; ".join(case.name for case in cases)
            raise ConfigError(f"{part!r} is no part of a name in {section}, which has: {names}.")
        chosen |= {(case.section, case.name): case for case in found}
    return list(chosen.values())
