"""The commands, put together. Heavy imports wait inside them, so that `--help` is quick."""

import os
from typing import Annotated

import typer

from resolvent._version import __version__
from resolvent.cli.benchmark import benchmark
from resolvent.cli.convert import convert
from resolvent.cli.evaluate import evaluate
from resolvent.cli.generate import generate
from resolvent.cli.presets import presets
from resolvent.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: resolvent train --out runs/first --steps 300",
)
for command in (train, generate, evaluate, convert, presets, benchmark):
    app.command(no_args_is_help=False)(command)


def _show_version(value: bool) -> None:
    if value:
        print(f"resolvent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, as the variable RESOLVENT_DEBUG=1 does.")
    ] = False,
) -> None:
    """Language models that read in linear time: train them, measure them, let them write."""
    if debug:
        os.environ["RESOLVENT_DEBUG"] = "1"
