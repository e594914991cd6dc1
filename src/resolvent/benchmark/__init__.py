"""Speed and memory: the figures of `resolvent benchmark`.

An entry is timed only after its result agrees with a float64 reference. Peers are measured in the same run, in their
fastest form, and every figure is compared with the limits of the machine: a large copy and a large matrix product.
"""

from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from resolvent.benchmark import decoding, memory, operators, serving, training
from resolvent.benchmark.harness import Bench, WrongResultError
from resolvent.benchmark.report import Report, Row, Target
from resolvent.benchmark.timing import keep_freed_memory, measure_ceilings

__all__ = ["SECTIONS", "Report", "Row", "Target", "WrongResultError", "run"]

SECTIONS: dict[str, Callable[[Bench], None]] = {
    module.SECTION: module.measure for module in (operators, training, memory, decoding, serving)
}
"""Sections of the benchmark, in order."""


def run(
    sections: Sequence[str],
    *,
    device: torch.device,
    quick: bool = False,
    compiled: bool = True,
    console: Console | None = None,
) -> Report:
    """Run the benchmark.

    Args:
        sections: keys of ``SECTIONS``.
        device: the device, which decides sizes, dtype and peers.
        quick: tiny sizes, to check that it runs; the figures mean nothing.
        compiled: compile our model wherever the peer is compiled.
        console: console that shows progress; None shows nothing.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 512 if quick else 8192 if device.type == "cuda" else 2048
    scale = "quick" if quick else "cuda" if device.type == "cuda" else "cpu"
    if scale == "cpu":
        keep_freed_memory()
    ceilings = measure_ceilings(device, dtype, size)
    bench = Bench(device, scale, ceilings, compiled, console or Console(quiet=True))
    for section in sections:
        SECTIONS[section](bench)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Report(scale, name, ceilings, bench.rows)
