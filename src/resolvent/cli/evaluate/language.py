"""`resolvent evaluate language`, which is `resolvent evaluate` by itself."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.loading import BatchTokens, Device, Directory, Text, documents_of
from resolvent.runs import load_trained, run_of


def language(
    directory: Directory,
    data: Text = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead of a text, with commas between.")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="Folder with YAML tasks of your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure how well a model predicts text.

    Prints loss, perplexity and bits per byte; each document is read whole, from its beginning. Bits per byte compare
    models whatever their tokenizers; eight are those of a model that knows nothing.

    Example: [bold]resolvent evaluate runs/tiny --data novel.txt --json[/bold]
    """
    if tasks is not None:
        if data is not None:
            raise typer.BadParameter("give a text or tasks, not both", param_hint="--tasks")
        _evaluate_tasks(directory, tasks.split(","), task_path, device, as_json)
        return
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


def _evaluate_tasks(directory: Path, tasks: list[str], task_path: Path | None, device: str, as_json: bool) -> None:
    from resolvent.device import pick_device
    from resolvent.evaluation.tasks import evaluate_tasks

    place = str(pick_device(device))
    results = evaluate_tasks(directory, run_of(directory), tasks, task_path=task_path, device=place)
    if as_json:
        print(json.dumps(results["results"]))
        return
    from lm_eval.utils import make_table

    print(make_table(results))
