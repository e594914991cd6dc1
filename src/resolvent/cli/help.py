"""Help texts without the line breaks of docstrings, which Typer would keep at any width of the terminal."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from resolvent.seeds import MOST_SEED

_TYPES = {"int": "INT", "float": "FLOAT", "str": "TEXT", "path": "PATH"}
"""Names of types in the help, in capitals as FILE and DIR."""


class _FoldedHelp:
    """Mixin for commands, whose help folds long names and shows neither the type of flags nor the bound of seeds."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, where newer versions of Typer put arguments in braces."""
        inherited: Any = super()
        return [piece.strip("{}") for piece in inherited.collect_usage_pieces(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _fold_names()
        parameters: Any = self
        for parameter in parameters.get_params(ctx):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            holders: Any = (parameter, getattr(parameter, "type", None))  # by version of Typer
            for bounds in holders:
                if getattr(bounds, "max", None) == MOST_SEED:
                    bounds.max = None
            _name_type(parameter, ctx)
        inherited: Any = super()
        with _one_column_of_names(parameters.get_params(ctx)):
            inherited.format_help(ctx, formatter)


@contextmanager
def _one_column_of_names(parameters: list[Any]) -> Iterator[None]:
    """Show `--no-x` beside `--x`, within the `with` block: a column of its own would be empty in other lines."""
    switches = [(each, each.opts, each.secondary_opts) for each in parameters]
    for each, names, negative in switches:
        each.opts, each.secondary_opts = [*names, *negative], []
    try:
        yield
    finally:
        for each, names, negative in switches:
            each.opts, each.secondary_opts = names, negative


def _name_type(parameter: Any, context: Any) -> None:
    """Show `INT [x>=1]` in the place of `<int range> [x>=1]`, and no type beside the name of an argument."""
    display = getattr(parameter, "display_type", None)  # by version of Typer
    if display is None:
        return
    if parameter.param_type_name == "argument":
        parameter.display_type_rich = lambda ctx: None
    elif parameter.metavar is None and (name := display(context)).startswith("<"):
        plain = name[1:-1].removesuffix(" range")
        parameter.metavar = _TYPES.get(plain, plain)


class Command(_FoldedHelp, TyperCommand):
    """A command whose help folds long names instead of cutting them."""


class Group(_FoldedHelp, TyperGroup):
    """A group of commands whose help folds long names instead of cutting them."""


def flowing(command: Callable[..., Any]) -> str:
    """Return the docstring of a command with one line per paragraph."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def add_command(app: typer.Typer, command: Callable[..., Any]) -> None:
    """Register a function as a command, with its docstring as help."""
    app.command(cls=Command, help=flowing(command), no_args_is_help=False)(command)


def _fold_names() -> None:
    """Fold names of options that are too long for a narrow terminal.

    Typer's tables would end them with an ellipsis. All names pass through its highlighter. If a later Typer has none,
    its help is not changed.
    """
    from rich.highlighter import RegexHighlighter
    from rich.text import Text
    from typer import rich_utils

    module: Any = rich_utils
    typers = getattr(module, "highlighter", None)
    if not isinstance(typers, RegexHighlighter):
        return

    class Folding(RegexHighlighter):
        highlights = typers.highlights

        def highlight(self, text: Text) -> None:
            text.overflow = "fold"
            super().highlight(text)

    module.highlighter = Folding()
