"""`resolvent inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resolvent.cli.console import progress_console, status, write_result
from resolvent.cli.loading import (
    Device,
    Directory,
    JsonFile,
    check_output,
    given_text,
)
from resolvent.cli.texts import HeldOut, TextField, TextOptions, read_tokens
from resolvent.runs import check_model, load_trained, run_of
from resolvent.terminal import say
from resolvent.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from resolvent.data import TokenStream
    from resolvent.inspection import Inspection
    from resolvent.models import IntegratedModel

PAGE = "inspection.html"


def inspect(
    directory: Directory,
    text: Annotated[
        str | None, typer.Option(help="Text to read.", show_default="the first document that the run held out")
    ] = None,
    file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="File with the text; - for standard input.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="File or folder with text, JSON Lines or Parquet, whose first document is read.",
            show_default=False,
        ),
    ] = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Second run, or a checkpoint in it, to show beside the first.", show_default=False
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, max=8192, help="Most tokens to read.")] = 500,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Page to write.", show_default="inspection.html in DIR"),
    ] = None,
    json_path: JsonFile = None,
    device: Device = "auto",
) -> None:
    """Write a page that shows the inside of a model on a text.

    The HTML page opens in any browser and needs no network. Its findings stand first; pictures show the loss of every
    token, the influence of every token on the last prediction, learning curves, decay rates, attention and memories.

    Example: [bold]resolvent inspect runs/tiny --text "My fellow citizens" --out page.html[/bold]
    """
    if text is not None and file is not None:
        raise typer.BadParameter("the file holds the text; leave out --text", param_hint="--file")
    if (data is not None or text_field is not None or held_out) and (text is not None or file is not None):
        raise typer.BadParameter(
            "the text is given; leave out --data, --text-field and --held-out", param_hint="--data"
        )
    run_dir = run_of(directory)
    if out is not None:
        check_output(out, "--out")
    options = TextOptions(data, text_field, held_out)
    options.check()
    for path in (directory, compare):
        if path is not None:
            check_model(path)
    from resolvent.files import write_file, write_output
    from resolvent.inspection import page_data, render_page

    trained = [(path, load_trained(path, device)) for path in (directory, compare) if path is not None]
    if text is None and file is None:
        stream = read_tokens(directory, trained[0][1][1], options, progress_console(json_path))
        read = _first_document(stream, trained[0][1][1], compared=compare is not None)
    else:
        read = given_text(file, str(text))
    with status("Reading"):
        first, *others = [_inspect(path, *model, read, length) for path, model in trained]
        page = render_page(first, *others).encode()
    if out is None:
        out = run_dir / PAGE
        write_file(out, page)
    else:
        write_output(out, page)
    write_result(json_path, page_data(first, *others) if others else first.to_dict())
    message = f"{out}: {counted(len(first.tokens), 'token')}, {len(page) / 1e6:.1f} MB; open it in a browser"
    say(progress_console(json_path), message)


def _first_document(stream: "TokenStream", tokenizer: "Tokenizer", *, compared: bool) -> "str | np.ndarray":
    """Return the tokens of the first document, or its text, which the tokenizers of two runs encode.

    Raises:
        DataError: the text of a conversation, whose special tokens would be read as words.
    """
    from resolvent.data.stream import token_ids
    from resolvent.errors import DataError

    end = int(stream.starts[1]) if stream.num_documents > 1 else stream.num_predictions
    ids = token_ids(stream.tokens[:end])
    if not compared:
        return ids
    if stream.signed:
        raise DataError("the run learned from conversations, which two runs may encode differently: give --text")
    return tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False)


def _inspect(
    directory: Path, model: "IntegratedModel", tokenizer: "Tokenizer", text: "str | np.ndarray", length: int
) -> "Inspection":
    from resolvent.inspection import inspect_model
    from resolvent.training.metrics import FILE_NAME

    metrics = run_of(directory) / FILE_NAME
    found = metrics if metrics.exists() else None
    return inspect_model(model, tokenizer, text, length=length, name=str(directory), metrics=found)
