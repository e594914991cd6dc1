"""`resolvent evaluate positions`: the loss by position, far beyond the length of training."""

from typing import Annotated

import typer

from resolvent.cli.evaluate.tables import Joined, load, plus_minus, show, write
from resolvent.cli.loading import BatchTokens, Device, Directory, JsonFile, PlotFile
from resolvent.cli.texts import HeldOut, Text, TextField, TextOptions


def positions(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    length: Annotated[int, typer.Option(min=1, help="Most tokens per text.")] = 65536,
    sequences: Annotated[int, typer.Option(min=1, help="Number of texts, the longest documents first.")] = 16,
    joined: Joined = False,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure the loss of the 1st, 2nd, ... 65,536th token.

    Texts are read from their beginning with the state carried along. The same tokens are also read in windows of the
    training length, each with a fresh state: [bold]gain[/bold] is the loss that the carried state saves, in nats per
    token. A positive gain means that the far context helps. ± is one standard error.

    Example: [bold]resolvent evaluate positions runs/tiny --length 16384 --plot positions.png[/bold]
    """
    text = TextOptions(data, text_field, held_out)
    model, tokenizer, stream = load(directory, text, device, json_path)
    from resolvent.evaluation import evaluate_positions
    from resolvent.evaluation.statistics import Bucket

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
    try:
        write(scores, options, directory, text, json_path)
        if plot_path is not None:
            from resolvent.evaluation.plots import plot_positions

            plot_positions(scores, plot_path)
    finally:
        show(json_path, f"{directory}, loss by position; windows of {scores.training_length:,} tokens", columns, rows)
