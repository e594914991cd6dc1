"""`resolvent benchmark`."""

import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resolvent.cli.console import STDOUT, progress_console, report_console, show_table, write_result
from resolvent.cli.loading import Device, JsonFile, wrong_usage
from resolvent.terminal import say
from resolvent.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from resolvent.benchmark import Benchmark, Report
    from resolvent.benchmark.report import StoredRun


def benchmark(
    only: Annotated[
        str | None,
        typer.Option(
            metavar="SECTION[:PART][,...]",
            help="Of operators, training, memory, decoding, serving; with PART the cases that have it in their name, "
            "such as training:base-hybrid.",
            show_default="all",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, to check that it runs; the figures mean nothing.")
    ] = False,
    json_path: JsonFile = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Show the change of every figure against a run that --json stored in FILE."),
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Train our model without compiling it; the peer is compiled anyway.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Measure speed and memory beside peers, after checking the results for correctness.

    Peers are attention (PyTorch's SDPA), a Transformer of the same size with a compiled training step and a CUDA-graph
    decoder, and flash-linear-attention where it is installed. On CUDA it takes minutes, most of them for compilation;
    choose sections with --only. Without CUDA, sizes are small and float32.

    Reading the tables: [bold]times better[/bold] compares with the best peer, [bold]% of limit[/bold] with the time
    that the bytes (MB) or the arithmetic (GFLOP) would take at the speed of a large copy or a large product of matrices
    in the same run, [bold]error[/bold] with a float64 reference. In a target such as "<= 0.055 (0.09)" the second
    figure is acceptable. Targets of speed-ups are for one H200, the others for one H100.

    Figures that could not be measured are listed, and the exit code is 1. A missed target is no failure. The file of
    --json is written after every row, and Ctrl-C or SIGTERM shows what was measured.

    Example: [bold]resolvent benchmark --only operators,training --json figures.json[/bold], and after a change
    [bold]resolvent benchmark --only operators,training --compare figures.json[/bold]
    """
    import torch

    from resolvent.benchmark import SECTIONS, Benchmark
    from resolvent.benchmark.report import StoredRun
    from resolvent.device import pick_device

    stored = None if compare is None else StoredRun.read(compare)
    progress = progress_console(json_path)
    with wrong_usage("--only"):
        run = Benchmark(
            only.split(",") if only is not None else list(SECTIONS),
            device=pick_device(device),
            quick=quick,
            compiled=not eager,
            console=progress,
        )
    stop: int | None = None
    try:
        stop = _measure(run, json_path)
        write_result(json_path, run.report.to_dict())
    finally:
        console = report_console(json_path)
        _show(run.report, torch.get_num_threads(), console)
        if stored is not None:
            _show_changes(run.report, stored, console)
    if stop is not None:
        raise typer.Exit(128 + stop)
    if run.report.failures:
        raise typer.Exit(1)


def _measure(run: "Benchmark", json_path: Path | None) -> int | None:
    """Measure until the end or a signal, which is returned."""
    from resolvent.training import terminable

    try:
        with terminable():
            run.measure(partial(_keep, json_path))
    except KeyboardInterrupt as interrupt:
        return getattr(interrupt, "signal_number", signal.SIGINT)
    return None


def _keep(json_path: Path | None, report: "Report") -> None:
    """Write the figures so far into the file of --json."""
    if json_path != STDOUT:
        write_result(json_path, report.to_dict())


def _show(report: "Report", threads: int, console: "Console") -> None:
    from resolvent.benchmark.report import STYLES, TEXT_COLUMNS

    for table in report.tables():
        say(console, f"\n{table.title}")
        show_table(console, table.columns, table.rows, text=TEXT_COLUMNS, styles=STYLES)
    limits, where = report.ceilings, report.device if report.device != "CPU" else f"{counted(threads, 'CPU thread')}"
    say(
        console,
        f"\n{where}: copies at {limits.bytes_per_second / 1e9:,.0f} GB/s, "
        f"multiplies at {limits.flops_per_second / 1e12:,.2f} TFLOP/s",
    )
    for failure in report.failures:
        say(console, f"failed: {failure}", style="red")
    if report.missing:
        say(console, f"stopped; not complete: {'; '.join(report.missing)}", style="red")


def _show_changes(report: "Report", stored: "StoredRun", console: "Console") -> None:
    from resolvent.benchmark.report import TEXT_COLUMNS

    table = stored.changes(report.rows)
    say(console, f"\nchange against the stored run of scale {stored.scale} ({stored.device}, PyTorch {stored.torch})")
    show_table(console, table.columns, table.rows, text=TEXT_COLUMNS)
