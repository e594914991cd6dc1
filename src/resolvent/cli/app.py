"""The commands, put together. Heavy imports wait inside them, so that `--help` is quick."""

import os
from typing import Annotated

import typer

from resolvent._version import __version__
from resolvent.cli.benchmark import benchmark
from resolvent.cli.convert import convert
from resolvent.cli.evaluate import Measures
from resolvent.cli.evaluate.language import language
from resolvent.cli.evaluate.mechanisms import mechanisms
from resolvent.cli.evaluate.positions import influence, needle, positions
from resolvent.cli.generate import generate
from resolvent.cli.inspect import inspect
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
for command in (train, generate, inspect, convert, presets, benchmark):
    app.command(no_args_is_help=False)(command)

measures = typer.Typer(cls=Measures, no_args_is_help=True, rich_markup_mode="rich", subcommand_metavar="[MEASURE] DIR")
for measure in (language, positions, needle, influence, mechanisms):
    measures.command(no_args_is_help=False)(measure)
app.add_typer(measures, name="evaluate")


@measures.callback()
def evaluate() -> None:
    """Measure what a model has learnt.

    Without the name of a measure it is [bold]language[/bold]: how well the model
    predicts text. The next three go far beyond the length that it was
    trained on, by default to 65,536 tokens. They print a table, write its
    figures with --json FILE and draw them with --plot FILE. The last tells
    what parts of a Phase 2 model do for it. Each explains its figures with
    --help.

    Example: [bold]resolvent evaluate runs/tiny --data novel.txt[/bold]

    Example: [bold]resolvent evaluate positions runs/tiny --data novel.txt --plot positions.png[/bold]
    """


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
