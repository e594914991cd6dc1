"""`resolvent inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import progress_console, status, write_result
from resolvent.cli.loading import (
    Device,
    Directory,
    HeldOut,
    JsonFile,
    TextField,
    check_output,
    documents_of,
    given_text,
)
from resolvent.runs import load_trained, run_of
from resolvent.terminal import say

PAGE = "inspection.html"


def inspect(
    directory: Directory,
    text: Annotated[
        str | None, typer.Option(help="Text to read.", show_default="the first held-out document of the default corpus")
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
    length: Annotated[int, typer.Option(min=2, max=8192, help="Most tokens to read.")] = 500,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Page to write.", show_default="inspection.html in DIR"),
    ] = None,
    json_path: JsonFile = None,
    device: Device = "auto",
) -> None:
    """Write a page that shows the inside of a model on a text.

    The HTML page opens in any browser and needs no network. It shows learning curves, the loss of every token, the
    memories and their decay, and the influence of every token on the last prediction. Every picture has an explanation.

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
    model, tokenizer = load_trained(directory, device)
    from resolvent.files import write_file, write_output
    from resolvent.inspection import inspect_model, render_page
    from resolvent.training.metrics import FILE_NAME

    if text is None and file is None:
        text = documents_of(directory, data, text_field, held_out)[0]
    else:
        text = given_text(file, str(text))
    metrics = run_dir / FILE_NAME
    with status("Reading"):
        inspection = inspect_model(
            model,
            tokenizer,
            text,
            length=length,
            name=str(directory),
            metrics=metrics if metrics.exists() else None,
        )
    page = render_page(inspection).encode()
    if out is None:
        out = run_dir / PAGE
        write_file(out, page)
    else:
        write_output(out, page)
    write_result(json_path, inspection.to_dict())
    message = f"{out}: {len(inspection.tokens):,} tokens, {len(page) / 1e6:.1f} MB; open it in a browser"
    say(progress_console(json_path), message)
