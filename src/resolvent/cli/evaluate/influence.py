"""`resolvent evaluate influence`: the effect of tokens far back on a prediction."""

from typing import Annotated

import typer

from resolvent.cli.evaluate.tables import Seed, load, scientific, show, write
from resolvent.cli.loading import BatchTokens, Device, Directory, JsonFile, PlotFile
from resolvent.cli.texts import HeldOut, Text, TextField, TextOptions
from resolvent.wording import counted


def influence(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    length: Annotated[int, typer.Option(min=1, help="Longest distance in tokens.")] = 65536,
    sequences: Annotated[int, typer.Option(min=1, help="Positions in the text.")] = 4,
    replacements: Annotated[int, typer.Option(min=1, help="Tokens to replace per bucket of each.")] = 4,
    seed: Seed = 0,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure the influence of early tokens on the prediction of the last token.

    [bold]gradient[/bold] is the norm of the gradient of the last loss in a token's embedding, averaged over the tokens
    of a bucket of distances. [bold]divergence[/bold] is the Kullback-Leibler divergence of the last prediction, in
    nats, when a token is replaced by another and all later tokens are read again. Both are exact over the whole length,
    through all states. ± is one standard error over the positions in the text.

    Example: [bold]resolvent evaluate influence runs/tiny --length 4096 --plot influence.png[/bold]
    """
    text = TextOptions(data, text_field, held_out)
    model, _, stream = load(directory, text, device, json_path)
    from resolvent.evaluation import measure_influence
    from resolvent.evaluation.statistics import Bucket

    options = dict(length=length, sequences=sequences, replacements=replacements, seed=seed)
    influences = measure_influence(model, stream, batch_tokens=batch_tokens, progress=True, **options)
    rows = [
        (str(Bucket(row.first, row.last)), scientific(row.gradient), scientific(row.divergence))
        for row in influences.rows
    ]
    title = f"{directory}, influence on the last prediction in {counted(sequences, 'text')}"
    try:
        write(influences, options, directory, text, json_path)
        if plot_path is not None:
            from resolvent.evaluation.plots import plot_influence

            plot_influence(influences, plot_path)
    finally:
        show(json_path, title, ("distance", "gradient", "divergence (nats)"), rows)
