"""Parameters that several commands have in common, and what they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from resolvent.cli.console import STDOUT
from resolvent.errors import ConfigError
from resolvent.runs import RUN_FILE, run_of

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Run folder, or a checkpoint in it.", show_default=False)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]
Text = Annotated[
    Path | None,
    typer.Option("--data", help="Text file, folder, .jsonl or .parquet.", show_default="the run's held-out documents"),
]


@contextmanager
def wrong_usage(option: str | None = None) -> Iterator[None]:
    """Blame the command line for a ConfigError within the block, which checks the values of options."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def check_output(path: Path, option: str) -> None:
    """Refuse, before anything is computed, a file that cannot be written.

    Raises:
        typer.BadParameter: it is a folder, or in no folder.
    """
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file.", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is no folder; make it first.", param_hint=option)


def _check_json(path: Path | None) -> Path | None:
    if path is not None and path != STDOUT:
        if str(path).startswith("-") or path.is_dir():
            raise typer.BadParameter(f"needs a FILE, or - for standard output; got {path}.", param_hint="--json")
        check_output(path, "--json")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_check_json,
        help="Write all figures to FILE, too; - for standard output instead of tables.",
    ),
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
    from resolvent.training.record import read_run

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
