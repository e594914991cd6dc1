"""`resolvent evaluate language`, which is `resolvent evaluate` by itself."""

import dataclasses
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import report_console, write_result
from resolvent.cli.evaluate.tables import show
from resolvent.cli.loading import (
    BatchTokens,
    Device,
    Directory,
    HeldOut,
    JsonFile,
    Text,
    TextField,
    WeightDtype,
    documents_of,
)
from resolvent.runs import load_trained, run_of
from resolvent.terminal import say


def language(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead of a text, separated by commas.")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="Folder with your own YAML tasks.")] = None,
    json_path: JsonFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
    dtype: WeightDtype = "float32",
) -> None:
    """Measure the loss of a model on text.

    Prints loss, perplexity and bits per byte; each document is read whole, from its beginning. Bits per byte are
    comparable across tokenizers; a uniform guess has eight.

    Example: [bold]resolvent evaluate runs/tiny --data novel.txt --json score.json[/bold]
    """
    if tasks is not None:
        if data is not None or text_field is not None or held_out:
            raise typer.BadParameter("give a text or tasks, not both", param_hint="--tasks")
        _evaluate_tasks(directory, tasks.split(","), task_path, device, json_path)
        return
    if task_path is not None:
        raise typer.BadParameter("says where tasks are; name them with --tasks", param_hint="--task-path")
    model, tokenizer = load_trained(directory, device, dtype=dtype)
    from resolvent.evaluation import evaluate_documents

    documents = documents_of(directory, data, text_field, held_out)
    score = evaluate_documents(model, documents, tokenizer, batch_tokens=batch_tokens, progress=True)
    cells = (f"{score.loss:.4f}", f"{score.perplexity:,.3f}", f"{score.bits_per_byte:.4f}", f"{score.tokens:,}")
    try:
        write_result(json_path, dataclasses.asdict(score))
    finally:
        named = ", ".join(data or [])
        text = "its held-out documents" if data is None else f"held-out documents of {named}" if held_out else named
        columns = ("loss (nats per token)", "perplexity", "bits per byte", "tokens")
        show(json_path, f"{directory} on {text}", columns, [cells])


def _evaluate_tasks(
    directory: Path, tasks: list[str], task_path: Path | None, device: str, json_path: Path | None
) -> None:
    from resolvent.device import pick_device
    from resolvent.evaluation.tasks import evaluate_tasks

    device_name = str(pick_device(device))
    with redirect_stdout(sys.stderr):  # the harness prints progress, too
        results = evaluate_tasks(directory, run_of(directory), tasks, task_path=task_path, device=device_name)
    try:
        write_result(json_path, results["results"])
    finally:
        from lm_eval.utils import make_table

        say(report_console(json_path), make_table(results))
