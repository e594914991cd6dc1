"""The application of all commands. Heavy imports are inside the commands, so that `--help` is quick."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from resolvent._version import __version__
from resolvent.cli.benchmark import benchmark
from resolvent.cli.chat import chat
from resolvent.cli.console import report_console
from resolvent.cli.convert import convert
from resolvent.cli.evaluate import measures
from resolvent.cli.generate import generate
from resolvent.cli.help import Group, add_command
from resolvent.cli.inspect import inspect
from resolvent.cli.presets import presets
from resolvent.cli.serve import serve
from resolvent.cli.tokenize import tokenize
from resolvent.cli.train import train

_UsageError: Any = typer.BadParameter.__mro__[1]  # of Click, or of its copy in newer versions of Typer


class Commands(Group):
    """All commands, with a remedy for --json without a FILE, and usage errors without control characters."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of a project: Typer puts groups behind commands."""
        names = [name for name in super().list_commands(ctx) if name != "evaluate"]
        place = names.index("inspect")
        return [*names[:place], "evaluate", *names[place:]]

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_errors():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:  # Typer has no public name of the error of a missing value
            if getattr(error, "option_name", None) == "--json":
                remedy = "needs a FILE, or - for standard output."
                raise typer.BadParameter(remedy, getattr(error, "ctx", None) or ctx, param_hint="--json") from error
            raise


@contextmanager
def _printable_errors() -> Iterator[None]:
    """Name the value in usage errors, and escape control characters of arguments on a terminal."""
    try:
        yield
    except _UsageError as error:
        from resolvent.terminal import for_terminal

        error.message = for_terminal(_with_value(error), sys.stderr)
        raise


def _with_value(error: Any) -> str:
    """Return the message of a usage error, with the value where Pydantic, which newer Typers use, leaves it out."""
    faults = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    if len(faults) != 1 or "Input should be" not in error.message:
        return error.message.removeprefix("Value error, ")
    return f"{error.message.replace('Input should be', 'must be', 1)}, got {faults[0]['input']}"


FIRST_STEPS = {
    "resolvent train --preset tiny-hybrid --steps 300 --out runs/first": "train a small model on presidents' speeches "
    "(minutes)",
    "resolvent generate runs/first --prompt 'The' --stream": "let it write",
    "resolvent evaluate runs/first": "measure it on text that it has not seen",
    "resolvent inspect runs/first": "make a page that shows what happens inside",
    "resolvent train --data my_text.txt --steps 300 --out runs/mine": "train on your own text",
}
"""Commands to try, each with its purpose."""

app = typer.Typer(
    cls=Commands,
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, tokenize, generate, chat, serve, inspect, convert, presets, benchmark):
    add_command(app, command)
app.add_typer(measures, name="evaluate")


def _show_version(value: bool) -> None:
    if value:
        print(f"resolvent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, as the variable RESOLVENT_DEBUG=1 does.")
    ] = False,
) -> None:
    """Train, measure and run linear-time language models.

    resolvent without a command shows five commands to try, and resolvent COMMAND --help the options of one.

    Example: [bold]resolvent train --preset tiny-hybrid --steps 300 --out runs/first[/bold]
    """
    if debug:
        os.environ["RESOLVENT_DEBUG"] = "1"
    if ctx.invoked_subcommand is None:
        _show_first_steps()


def _show_first_steps() -> None:
    from resolvent.terminal import say

    console = report_console(None)
    say(console, f"resolvent {__version__}: train, measure and run linear-time language models. Five things to try:")
    for command, purpose in FIRST_STEPS.items():
        say(console, f"\n  {command}\n      {purpose}")
    say(console, "\nresolvent --help lists all commands, resolvent COMMAND --help the options of one.")
