"""Parameters that several commands share, and their values."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from resolvent.cli.console import STDOUT
from resolvent.errors import ConfigError
from resolvent.runs import load_trained

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from resolvent.models import IntegratedModel
    from resolvent.models.sampling import SamplingOptions
    from resolvent.models.weights import Precision

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Run folder, or a checkpoint in it.", show_default=False)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]
Weights = Annotated[
    Literal["full", "stored", "int8"],
    typer.Option(
        help="full: float32; stored: as in the file, bfloat16 in half the memory; "
        "int8: on a CPU, rounded matrices, which write twice as fast."
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="On a CPU: write with compiled code, faster after half a minute, in which it is compiled. "
        "Needs a C++ compiler.",
    ),
]
StoredWeights = Annotated[
    Literal["full", "stored"],
    typer.Option("--weights", help="full: float32; stored: as in the file, bfloat16 in half the memory."),
]


@contextmanager
def wrong_usage(option: str | None = None) -> Iterator[None]:
    """Convert a ConfigError within the block, which checks options, to a usage error."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def load_for_generation(
    directory: Path, device: str, weights: 'Precision | Literal["stored"]', compile: bool = False
) -> "tuple[IntegratedModel, Tokenizer]":
    """Load a model, with weights of this precision, and its tokenizer; what it cannot have is a usage error."""
    model, tokenizer = load_trained(directory, device, dtype="stored" if weights == "stored" else "float32")
    if weights != "stored":
        from resolvent.models.weights import prepare_weights

        with wrong_usage("--weights"):
            prepare_weights(model, weights)
    if compile:
        with wrong_usage("--compile"):
            model.compile_steps()
    return model, tokenizer


def sampling_options(**options: Any) -> "SamplingOptions":
    """Return options of sampling; one that is out of range is a usage error of the option of its name."""
    from resolvent.models.sampling import SamplingOptions

    try:
        return SamplingOptions(**options)
    except ValueError as error:
        name, _, fault = str(error).partition(" ")
        raise typer.BadParameter(fault, param_hint=f"--{name.replace('_', '-')}") from error


def check_output(path: Path, option: str) -> None:
    """Check, before anything is computed, that a file can be written.

    Raises:
        typer.BadParameter: the path is a folder, a link in a circle, or in no folder.
    """
    from resolvent.files import output_path

    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file.", param_hint=option)
    try:
        folder = output_path(path).parent if path.is_symlink() else path.parent
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder; make it first.", param_hint=option)


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


def _check_plot(path: Path | None) -> Path | None:
    """Check, before anything is measured, that a plot can be drawn."""
    if path is not None:
        check_output(path, "--plot")
        from resolvent.evaluation.plots import check_format, check_plot

        with wrong_usage("--plot"):
            check_format(path)
        check_plot(path)
    return path


PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", callback=_check_plot, help="Draw the figures, as .png, .pdf or .svg."),
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens at once; fewer need less memory.")]


def given_text(file: BinaryIO | None, argument: str) -> str:
    """Return the text of a file, or that of an argument, whose invalid UTF-8 becomes U+FFFD.

    Raises:
        DataError: the file is not text.
    """
    if file is None:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    from resolvent.data.reading import read_text

    return read_text(file, Path(file.name))
