"""Parameters that several commands have in common, and what they stand for."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from resolvent.runs import run_of

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Run folder, or a checkpoint in it.", show_default=False)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]
Text = Annotated[
    Path | None,
    typer.Option("--data", help="Text file, folder, .jsonl or .parquet.", show_default="the run's held-out documents"),
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens at once; fewer need less memory.")]


def documents_of(directory: Path, data: Path | None, option: str = "--data") -> list[str]:
    """The documents of `data`, which `option` names; without it, those that the run in `directory` held out.

    Raises:
        CheckpointError: the folder is not that of a run.
        DataError: text that cannot be used.
    """
    from resolvent.data import load_documents
    from resolvent.errors import CheckpointError, DataError
    from resolvent.training.corpus import split_corpus
    from resolvent.training.record import RUN_FILE, read_run

    if data is not None:
        return load_documents(data)
    run_dir = run_of(directory)
    if not (run_dir / RUN_FILE).exists():
        raise CheckpointError(f"{run_dir} does not say what it was trained on: name a text with {option}")
    config, _ = read_run(run_dir)
    try:
        return split_corpus(config)[1]
    except DataError as error:
        raise DataError(f"{error}; or name another text with {option}") from error
