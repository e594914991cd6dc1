"""Options, figures and tables that all measures share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.cli.console import progress_console, report_console, show_table, write_result
from resolvent.cli.texts import TextOptions, read_tokens
from resolvent.runs import check_model, load_trained
from resolvent.seeds import MOST_SEED
from resolvent.terminal import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from resolvent.data import TokenStream
    from resolvent.evaluation.statistics import Estimate
    from resolvent.models import IntegratedModel


Joined = Annotated[bool, typer.Option("--joined", help="Join documents, for texts of short documents.")]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the choice of positions.")]


def load(
    directory: Path, text: TextOptions, device: str, json_path: Path | None
) -> "tuple[IntegratedModel, Tokenizer, TokenStream]":
    """Load a model, its tokenizer and the text to measure it on.

    Raises:
        DataError: the text is conversations, whose tokens are not all predicted.
    """
    check_model(directory)
    text.check()
    model, tokenizer = load_trained(directory, device)
    from resolvent.errors import DataError

    stream = read_tokens(directory, tokenizer, text, progress_console(json_path))
    if stream.signed:
        raise DataError(
            f"{directory} learned from conversations, and this measure needs text: name one with --data; "
            "`resolvent evaluate language` scores the answers of conversations"
        )
    return model, tokenizer, stream


def write(
    scores: Any,
    options: dict[str, Any],
    directory: Path,
    text: TextOptions,
    json_path: Path | None,
) -> None:
    """Write figures and settings into the file of --json."""
    data = text.data[0] if text.data is not None and len(text.data) == 1 else text.data
    settings = options | {"model": str(directory), "data": data, "held_out": text.held_out or data is None}
    write_result(json_path, {"settings": settings, **scores.to_dict()})


def show(json_path: Path | None, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of figures, unless --json writes to standard output."""
    console = report_console(json_path)
    say(console, title)
    show_table(console, columns, rows)


def plus_minus(estimate: "Estimate", *, signed: bool = False, percent: bool = False) -> str:
    """Return a mean and its standard error as a cell."""
    mean, error = estimate.mean, estimate.standard_error
    if percent:
        return f"{mean:.1%}" + (f" ± {error:.1%}" if error is not None else "")
    return f"{mean:{'+' if signed else ''}z.4f}" + (f" ± {error:.4f}" if error is not None else "")


def scientific(estimate: "Estimate") -> str:
    """Return a mean and its standard error as a cell, with exponents."""
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.1e}"
    return f"{estimate.mean:.3e}{error}"
