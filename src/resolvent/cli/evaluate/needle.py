"""`resolvent evaluate needle`: recall of a fact over a distance."""

from typing import Annotated

import typer

from resolvent.cli.evaluate.tables import PlotFile, Seed, load, plus_minus, show, write
from resolvent.cli.loading import BatchTokens, Device, Directory, HeldOut, JsonFile, Text, TextField


def needle(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
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

    A pass key is told in the midst of real text and asked for after 16, 32, ... 65,536 tokens more of it. So that small
    models can be measured, too, the true key is ranked among random ones by its likelihood: [bold]first[/bold] is how
    often it is the likeliest, [bold]beaten[/bold] the share of the others whose likelihood has risen less since before
    the key was told. [bold]exact[/bold] is how often the model, always taking the likeliest token, writes it. ± is one
    standard error.

    Example: [bold]resolvent evaluate needle runs/tiny --length 4096 --samples 100 --json needle.json[/bold]
    """
    model, tokenizer, stream = load(directory, data, text_field, held_out, device)
    from resolvent.evaluation import evaluate_needle

    options = dict(length=length, samples=samples, candidates=candidates, seed=seed)
    scores = evaluate_needle(model, stream, tokenizer, batch_tokens=batch_tokens, progress=True, **options)
    rows = [
        (f"{row.distance:,}", *(plus_minus(share, percent=True) for share in (row.first, row.beaten, row.exact)))
        for row in scores.rows
    ]
    chance = ("by chance", f"{scores.chance:.1%}", "50.0%", "")
    title = f"{directory}, a pass key among {candidates:,} in {samples:,} places"
    try:
        write(scores, options, directory, data, held_out, json_path)
        if plot_path is not None:
            from resolvent.evaluation.plots import plot_needle

            plot_needle(scores, plot_path)
    finally:
        show(json_path, title, ("distance", "first", "beaten", "exact"), [*rows, chance])
