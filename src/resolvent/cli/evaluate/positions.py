"""`resolvent evaluate positions | needle | influence`: far beyond the length that a model was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.cli.console import table_console
from resolvent.cli.loading import BatchTokens, Device, Directory, Text, documents_of
from resolvent.runs import load_trained

if TYPE_CHECKING:
    from rich.table import Table
    from tokenizers import Tokenizer

    from resolvent.data import TokenStream
    from resolvent.evaluation.estimates import Estimate
    from resolvent.models import IntegratedModel

Seed = Annotated[int, typer.Option(min=0, help="Makes the choice of places repeatable.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write all figures to FILE, too.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", dir_okay=False, help="Draw them, as .png, .pdf or .svg.")
]


def positions(
    directory: Directory,
    data: Text = None,
    length: Annotated[int, typer.Option(min=1, help="Most tokens to read in a row.")] = 65536,
    sequences: Annotated[int, typer.Option(min=1, help="How many texts to read, the longest documents first.")] = 16,
    joined: Annotated[
        bool, typer.Option("--joined", help="Read on from document to document, where documents are short.")
    ] = False,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure how well a model predicts the 1st, 2nd, ... 65,536th token.

    Texts are read from their beginning with the state carried along. Beside
    it, the same tokens are read in windows of the training length, each with
    a fresh state: [bold]gain[/bold] is what the carried state makes better, in nats a
    token. Where it is positive the far past helps, where it is negative it
    harms. ± is one standard error.

    Example: [bold]resolvent evaluate positions runs/tiny --length 16384 --plot positions.png[/bold]
    """
    check_files(json_path, plot_path)
    model, tokenizer, stream = load(directory, data, device)
    from resolvent.evaluation import evaluate_positions
    from resolvent.evaluation.estimates import Bucket

    options = dict(length=length, sequences=sequences, joined=joined)
    scores = evaluate_positions(model, stream, tokenizer, batch_tokens=batch_tokens, progress=True, **options)
    columns = ("tokens read", "texts", "predicted", "loss", "perplexity", "bits per byte", "in windows", "gain")
    rows = [
        (
            str(Bucket(row.first, row.last)),
            f"{row.sequences:,}",
            f"{row.tokens:,}",
            plus_minus(row.loss),
            f"{row.perplexity:,.3f}",
            "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
            plus_minus(row.windows_loss),
            plus_minus(row.gain, signed=True),
        )
        for row in scores.rows
    ]
    show(f"{directory}, loss by position; windows of {scores.training_length:,} tokens", columns, rows)
    write(scores, options, directory, data, json_path)
    if plot_path is not None:
        from resolvent.evaluation.plots import plot_positions

        plot_positions(scores, plot_path)


def needle(
    directory: Directory,
    data: Text = None,
    length: Annotated[int, typer.Option(min=16, help="Longest distance in tokens.")] = 65536,
    samples: Annotated[int, typer.Option(min=1, help="Places in the text, each with a key of its own.")] = 32,
    candidates: Annotated[int, typer.Option(min=2, help="Keys of which one is true.")] = 32,
    seed: Seed = 0,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure whether a model remembers a fact over a distance.

    A pass key is told in the midst of real text and asked for after 16, 32,
    ... 65,536 tokens more of it. So that small models can be measured, too,
    the true key is ranked among random ones by its likelihood: [bold]first[/bold] is
    how often it is the likeliest, [bold]beaten[/bold] the share of the others whose
    likelihood has risen less since before the key was told. [bold]exact[/bold] is how
    often the model, always taking the likeliest token, writes it. ± is one
    standard error.

    Example: [bold]resolvent evaluate needle runs/tiny --length 4096 --samples 100 --json needle.json[/bold]
    """
    check_files(json_path, plot_path)
    model, tokenizer, stream = load(directory, data, device)
    from resolvent.evaluation import evaluate_needle

    options = dict(length=length, samples=samples, candidates=candidates, seed=seed)
    scores = evaluate_needle(model, stream, tokenizer, batch_tokens=batch_tokens, progress=True, **options)
    rows = [
        (f"{row.distance:,}", *(plus_minus(share, percent=True) for share in (row.first, row.beaten, row.exact)))
        for row in scores.rows
    ]
    chance = ("by chance", f"{scores.chance:.1%}", "50.0%", "")
    title = f"{directory}, a pass key among {candidates:,} in {samples:,} places"
    show(title, ("distance", "first", "beaten", "exact"), [*rows, chance])
    write(scores, options, directory, data, json_path)
    if plot_path is not None:
        from resolvent.evaluation.plots import plot_needle

        plot_needle(scores, plot_path)


def influence(
    directory: Directory,
    data: Text = None,
    length: Annotated[int, typer.Option(min=1, help="Longest distance in tokens.")] = 65536,
    sequences: Annotated[int, typer.Option(min=1, help="Places in the text.")] = 4,
    replacements: Annotated[int, typer.Option(min=1, help="Tokens to replace in a bucket of each.")] = 4,
    seed: Seed = 0,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure what tokens far back do to the prediction of the last one.

    [bold]gradient[/bold] is the norm of the gradient of the last loss in a token's
    embedding, on average over the tokens of a bucket of distances: what a
    small change would do. [bold]divergence[/bold] is how far the last prediction
    moves, in nats, when a token is replaced by another and all that follows
    is read again. Both are exact over the whole length, through all states.
    ± is one standard error over the places in the text.

    Example: [bold]resolvent evaluate influence runs/tiny --length 4096 --plot influence.png[/bold]
    """
    check_files(json_path, plot_path)
    model, _, stream = load(directory, data, device)
    from resolvent.evaluation import measure_influence
    from resolvent.evaluation.estimates import Bucket

    options = dict(length=length, sequences=sequences, replacements=replacements, seed=seed)
    influences = measure_influence(model, stream, batch_tokens=batch_tokens, progress=True, **options)
    rows = [
        (str(Bucket(row.first, row.last)), _scientific(row.gradient), _scientific(row.divergence))
        for row in influences.rows
    ]
    title = f"{directory}, influence on the last prediction in {sequences:,} texts"
    show(title, ("distance", "gradient", "divergence (nats)"), rows)
    write(influences, options, directory, data, json_path)
    if plot_path is not None:
        from resolvent.evaluation.plots import plot_influence

        plot_influence(influences, plot_path)


def check_files(json_path: Path | None, plot_path: Path | None) -> None:
    """Find out before the measurement, not after it, that its result cannot be written."""
    for path, option in ((json_path, "--json"), (plot_path, "--plot")):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is no folder; make it first.", param_hint=option)
    if plot_path is not None:
        from resolvent.evaluation.plots import check_plot

        check_plot(plot_path)


def load(directory: Path, data: Path | None, device: str) -> "tuple[IntegratedModel, Tokenizer, TokenStream]":
    """A model, its tokenizer and the text to measure it on."""
    model, tokenizer = load_trained(directory, device)
    from resolvent.data import encode_documents

    return model, tokenizer, encode_documents(documents_of(directory, data), tokenizer, progress=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. One too wide for the terminal has headings and ± on lines of their own; no figure is cut off."""
    console = table_console()
    table, width = _table(columns, rows)
    if width > console.width:
        headings = [heading.replace(" ", "\n") for heading in columns]
        table, width = _table(headings, [[cell.replace(" ±", "\n±") for cell in row] for row in rows])
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, width)
    console.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> "tuple[Table, int]":
    """A table and how wide it is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table, Console(width=10_000).measure(table).maximum


def write(scores: Any, options: dict[str, Any], directory: Path, data: Path | None, json_path: Path | None) -> None:
    from resolvent.files import write_json

    if json_path is not None:
        settings = options | {"model": str(directory), "data": str(data) if data else None}
        write_json(json_path, {"settings": settings, **scores.to_dict()})


def plus_minus(estimate: "Estimate", *, signed: bool = False, percent: bool = False) -> str:
    mean, error = estimate.mean, estimate.standard_error
    if percent:
        return f"{mean:.1%}" + (f" ± {error:.1%}" if error is not None else "")
    return f"{mean:{'+' if signed else ''}z.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _scientific(estimate: "Estimate") -> str:
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.1e}"
    return f"{estimate.mean:.3e}{error}"
