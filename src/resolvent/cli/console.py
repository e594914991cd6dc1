"""Where tables are printed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 150
"""Columns of a table that nobody folds, where the output is no terminal."""


def table_console() -> "Console":
    """Standard output, as wide as its terminal, and wide enough for any table where it is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
