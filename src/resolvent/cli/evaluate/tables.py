"""Options, figures and tables that all measures share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.cli.console import report_console, show_table, write_result
from resolvent.cli.loading import documents_of
from resolvent.runs import load_trained
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
    directory: Path, data: list[str] | None, text_field: str | None, held_out: bool, device: str
) -> "tuple[IntegratedModel, Tokenizer, TokenStream]":
    """Load a model, its tokenizer and the text to measure it on."""
    model, tokenizer = load_trained(directory, device)
    from resolvent.data import encode_documents

    documents = documents_of(directory, data, text_field, held_out)
    return model, tokenizer, encode_documents(documents, tokenizer, progress=True)


def write(
    scores: Any,
    options: dict[str, Any],
    directory: Path,
    data: list[str] | None,
    held_out: bool,
    json_path: Path | None,
) -> None:
    """Write figures and settings into the file of --json."""
    text = {"data": data[0] if data is not None and len(data) == 1 else data, "held_out": held_out or data is None}
    settings = options | {"model": str(directory), **text}
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
