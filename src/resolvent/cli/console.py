"""Output of the commands: lines, tables, and figures as JSON."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resolvent.terminal import for_terminal, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STDOUT = Path("-")
"""FILE of --json for standard output."""

_WIDTH = 10_000
"""Width of output that is no terminal, if COLUMNS is not set: nothing is folded."""
_LEAST_TEXT = 12
"""Smallest width at which a table folds text."""
_INDENT = "  "
"""Beginning of a line on which a word goes on."""


def make_console(*, stderr: bool = False, quiet: bool = False) -> "Console":
    """Return a console without markup and emoji codes, and without colours under NO_COLOR."""
    from rich.console import Console

    color_system = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, color_system=color_system)


def report_console(json_path: Path | None) -> "Console":
    """Return the console for results: standard output, or a silent one if JSON goes there."""
    console = make_console(quiet=json_path == STDOUT)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _WIDTH
    return console


def progress_console(json_path: Path | None) -> "Console":
    """Return the console for progress: standard output, or standard error if JSON goes to standard output."""
    return make_console(stderr=json_path == STDOUT)


def print_text(text: str) -> None:
    """Write text to standard output as UTF-8 and flush; control characters are escaped on a terminal."""
    sys.stdout.buffer.write(for_terminal(text, sys.stdout).encode())
    sys.stdout.buffer.flush()


def status(text: str) -> AbstractContextManager[object]:
    """Show a status on standard error if that is a terminal."""
    from rich.text import Text

    console = make_console(stderr=True)
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    return console.status(Text(plain(text, console.encoding)), spinner=spinner)


def write_result(json_path: Path | None, values: Any) -> None:
    """Write the figures of --json, before the tables: on one line of standard output, or into a file.

    Infinities and NaN, which JSON lacks, are written as null.
    """
    from resolvent.files import write_output

    if json_path == STDOUT:
        print(json.dumps(_finite(values), allow_nan=False))
    elif json_path is not None:
        write_output(json_path, (json.dumps(_finite(values), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_table(
    console: "Console",
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[str] = (),
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print a table without truncating figures.

    If the console is too narrow, headings break at blanks and dashes, and ± begins a line; then text folds, names at
    their parts; a table that is still too wide exceeds the console.

    Args:
        console: the console.
        columns: headings of the columns.
        rows: one cell per column.
        text: headings of columns with text, aligned left; figures are aligned right.
        styles: styles of cells by their content.
    """
    cells = [[plain(cell, console.encoding).expandtabs() for cell in row] for row in (columns, *rows)]
    folds = [heading in text for heading in columns]
    if _width(_natural(cells)) > console.width:
        mark = plain(" ±", console.encoding)
        cells = [[heading.replace(" ", "\n").replace("-", "-\n") for heading in cells[0]]] + [
            [cell if fold else cell.replace(mark, f"\n{mark[1:]}") for cell, fold in zip(row, folds, strict=True)]
            for row in cells[1:]
        ]
    cells = _fitted(cells, folds, console.width)
    width = console.width
    console.width = max(width, _width(_natural(cells)))
    console.print(_table(cells, folds, styles or {}))
    console.width = width


def _natural(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of every column whose text is not folded."""
    from rich.cells import cell_len

    return [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(*cells, strict=True)]


def _width(widths: Sequence[int]) -> int:
    """Return the width of a table, with two blanks between columns."""
    return sum(widths) + 2 * (len(widths) - 1)


def _fitted(cells: list[list[str]], folds: Sequence[bool], width: int) -> list[list[str]]:
    """Fold text so far that a table fits, if it can: the columns with the widest texts first."""
    widths = _natural(cells)
    texts = sorted((i for i, fold in enumerate(folds) if fold), key=lambda i: widths[i])
    left = width - _width([0 if fold else size for size, fold in zip(widths, folds, strict=True)])
    for count, i in zip(range(len(texts), 0, -1), texts, strict=True):
        limit = max(left // count, _LEAST_TEXT)
        cells = [[*row[:i], _folded(row[i], limit), *row[i + 1 :]] for row in cells]
        left -= _natural(cells)[i]
    return cells


def _folded(text: str, width: int) -> str:
    """Fold a text at blanks, and words that are too long at their parts."""
    from rich.cells import cell_len, chop_cells

    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for part in _parts(word, width):
            if lines[-1].strip() and cell_len(lines[-1] + part) > width:
                lines.append(_INDENT)
            *whole, rest = chop_cells(lines[-1] + part, width) or [""]
            lines[-1:] = [*whole, rest]
    return "\n".join(lines)


def _parts(word: str, width: int) -> Iterator[str]:
    """Cut a word after points and slashes; parts that are still too long after dashes and underscores."""
    from rich.cells import cell_len

    for part in re.split(r"(?<=[./])", word):
        yield from re.split(r"(?<=[_-])", part) if cell_len(part) > width - len(_INDENT) else [part]


def _table(cells: Sequence[Sequence[str]], folds: Sequence[bool], styles: Mapping[str, str]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    headings, *rows = cells
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading, fold in zip(headings, folds, strict=True):
        table.add_column(Text(heading), justify="left" if fold else "right", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    return table
