"""`resolvent evaluate language`, which is `resolvent evaluate` by itself."""

import dataclasses
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import progress_console, report_console, write_result
from resolvent.cli.evaluate.tables import plus_minus, show
from resolvent.cli.loading import (
    BatchTokens,
    Device,
    Directory,
    JsonFile,
    StoredWeights,
)
from resolvent.cli.texts import Format, HeldOut, Text, TextField, TextOptions, read_tokens
from resolvent.runs import check_model, load_trained, run_of
from resolvent.terminal import say


def language(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    format: Format = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks instead of a text, separated by commas: human_eval, bigbench/NAME, or those of "
            "lm-evaluation-harness."
        ),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(help="Folder with your own YAML tasks, or the files of bigbench or else of human_eval."),
    ] = None,
    json_path: JsonFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
    weights: StoredWeights = "full",
) -> None:
    """Measure the loss of a model on text.

    Prints loss, perplexity and bits per byte; each document is read whole, from its beginning. Bits per byte are
    comparable across tokenizers; a uniform guess has eight. Of conversations, the assistant's answers are scored.
    Without --data, the text is the part that the run held out of its own.

    Example: [bold]resolvent evaluate runs/tiny --data novel.txt --json score.json[/bold]
    """
    check_model(directory)
    text = TextOptions(data, text_field, held_out, format)
    if tasks is not None:
        if text != TextOptions():
            raise typer.BadParameter("give a text or tasks, not both", param_hint="--tasks")
        from resolvent.evaluation.task_files import is_packaged

        names = [name.strip() for name in tasks.split(",")]
        if "" in names:
            raise typer.BadParameter(f"a name is missing in {tasks!r}", param_hint="--tasks")
        if any(map(is_packaged, names)):
            _evaluate_packaged(directory, names, task_path, device, batch_tokens, json_path)
        else:
            _evaluate_tasks(directory, names, task_path, device, json_path)
        return
    if task_path is not None:
        raise typer.BadParameter("says where tasks are; name them with --tasks", param_hint="--task-path")
    text.check()
    model, tokenizer = load_trained(directory, device, dtype="stored" if weights == "stored" else "float32")
    from resolvent.evaluation import evaluate_documents

    stream = read_tokens(directory, tokenizer, text, progress_console(json_path))
    score = evaluate_documents(model, stream, batch_tokens=batch_tokens, progress=True)
    cells = (f"{score.loss:.4f}", f"{score.perplexity:,.3f}", f"{score.bits_per_byte:.4f}", f"{score.tokens:,}")
    try:
        write_result(json_path, dataclasses.asdict(score))
    finally:
        scored = "the assistant's answers in " if stream.signed else ""
        columns = ("loss (nats per token)", "perplexity", "bits per byte", "tokens")
        show(json_path, f"{directory} on {scored}{text}", columns, [cells])


def _evaluate_packaged(
    directory: Path, names: list[str], files: Path | None, device: str, batch_tokens: int, json_path: Path | None
) -> None:
    """Evaluate tasks whose files come in packages."""
    from resolvent.evaluation.choices import evaluate_examples
    from resolvent.evaluation.task_files import is_packaged, load_tasks

    if others := [name for name in names if not is_packaged(name)]:
        raise typer.BadParameter(f"{', '.join(others)}: evaluate them in a call of their own", param_hint="--tasks")

    tasks = load_tasks(names, files)
    model, tokenizer = load_trained(directory, device)
    scores = {
        name: evaluate_examples(model, tokenizer, examples, batch_tokens=batch_tokens, progress=True)
        for name, examples in tasks.items()
    }
    rows = [
        (
            name,
            f"{score.examples:,}",
            *("-" if x is None else plus_minus(x, percent=True) for x in (score.accuracy, score.accuracy_per_byte)),
            "-" if score.chance is None else f"{score.chance:.1%}",
            plus_minus(score.nats_per_byte),
            plus_minus(score.exact, percent=True),
        )
        for name, score in scores.items()
    ]
    columns = ("task", "questions", "accuracy", "by byte", "chance", "nats per byte", "exact")
    try:
        write_result(json_path, {name: score.to_dict() for name, score in scores.items()})
    finally:
        show(json_path, f"{directory}: choices by likelihood", columns, rows)


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
