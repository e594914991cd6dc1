"""`resolvent evaluate language`, which is `resolvent evaluate` by itself."""

import dataclasses
import json
from typing import Annotated

import typer

from resolvent.cli.loading import BatchTokens, Device, Directory, Text, documents_of
from resolvent.training.trained import load_trained


def language(
    directory: Directory,
    data: Text = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure how well a model predicts text.

    Prints loss, perplexity and bits per byte; each document is read whole, from its beginning. Bits per byte compare
    models whatever their tokenizers; eight are those of a model that knows nothing.

    Example: [bold]resolvent evaluate runs/tiny --data novel.txt --json[/bold]
    """
    model, tokenizer = load_trained(directory, device)
    from rich.console import Console

    from resolvent.evaluation import evaluate_documents

    documents = documents_of(directory, data)
    with Console(stderr=True).status(f"Reading {len(documents):,} document(s)"):
        score = evaluate_documents(model, documents, tokenizer, batch_tokens=batch_tokens)
    if as_json:
        print(json.dumps(dataclasses.asdict(score), allow_nan=False))
        return
    from rich.table import Table

    table = Table(
        box=None, pad_edge=False, title=f"{directory} on {data or 'its held-out documents'}", title_justify="left"
    )
    for heading in ("loss (nats a token)", "perplexity", "bits per byte", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(f"{score.loss:.4f}", f"{score.perplexity:,.3f}", f"{score.bits_per_byte:.4f}", f"{score.tokens:,}")
    Console().print(table)
