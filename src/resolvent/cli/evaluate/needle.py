"""`resolvent evaluate needle`: recall of a fact over a distance."""

from typing import Annotated

import typer

from resolvent.cli.evaluate.tables import Seed, load, plus_minus, show, write
from resolvent.cli.loading import BatchTokens, Device, Directory, JsonFile, PlotFile
from resolvent.cli.texts import HeldOut, Text, TextField, TextOptions
from resolvent.wording import counted


def needle(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    length: Annotated[int, typer.Option(min=16, help="Longest distance in tokens.")] = 65536,
    samples: Annotated[int, typer.Option(min=1, help="Positions in the text, each with its own key.")] = 32,
    candidates: Annotated[int, typer.Option(min=2, help="Number of keys, one of them true.")] = 32,
    seed: Seed = 0,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure recall of a fact over a distance.

    A pass key is inserted into real text, and the question follows after 16, 32, ... 65,536 more tokens. To measure
    small models, too, the true key is ranked among random ones by likelihood: [bold]first[/bold] is the share of
    samples in which it is the likeliest, [bold]beaten[/bold] the share of the other keys whose likelihood rose less
    since before the fact. [bold]exact[/bold] is the share in which greedy decoding writes the key. ± is one standard
    error. Distances up to 65,536 tokens take minutes on a CPU, up to 1,024 seconds.

    Example: [bold]resolvent evaluate needle runs/tiny --length 4096 --samples 100 --json needle.json[/bold]
    """
    text = TextOptions(data, text_field, held_out)
    model, tokenizer, stream = load(directory, text, device, json_path)
    from resolvent.evaluation import evaluate_needle

    options = dict(length=length, samples=samples, candidates=candidates, seed=seed)
    scores = evaluate_needle(model, stream, tokenizer, batch_tokens=batch_tokens, progress=True, **options)
    rows = [
        (f"{row.distance:,}", *(plus_minus(share, percent=True) for share in (row.first, row.beaten, row.exact)))
        for row in scores.rows
    ]
    chance = ("by chance", f"{scores.chance:.1%}", "50.0%", "")
    title = f"{directory}, a pass key among {candidates:,} in {counted(samples, 'position')}"
    try:
        write(scores, options, directory, text, json_path)
        if plot_path is not None:
            from resolvent.evaluation.plots import plot_needle

            plot_needle(scores, plot_path)
    finally:
        show(json_path, title, ("distance", "first", "beaten", "exact"), [*rows, chance])
