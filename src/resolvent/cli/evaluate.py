"""`resolvent evaluate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.loading import Device, Directory
from resolvent.training.trained import load_trained, run_of


def evaluate(
    directory: Directory,
    data: Annotated[
        Path | None,
        typer.Option(help="Text file, folder, .jsonl or .parquet.", show_default="the run's held-out documents"),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead of a text, with commas between.")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="Folder with YAML tasks of your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens at once; fewer need less memory.")] = 4096,
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

    from resolvent.data import load_documents
    from resolvent.evaluation import evaluate_documents

    documents = load_documents(data) if data is not None else _held_out(directory)
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


def _held_out(directory: Path) -> list[str]:
    from resolvent.errors import CheckpointError
    from resolvent.training.corpus import split_corpus
    from resolvent.training.record import RUN_FILE, read_run

    run_dir = run_of(directory)
    if not (run_dir / RUN_FILE).exists():
        raise CheckpointError(f"{run_dir} does not say what it was trained on: name a text with --data")
    config, _ = read_run(run_dir)
    return split_corpus(config)[1]
