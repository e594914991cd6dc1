"""`resolvent tokenize`."""

from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import progress_console, write_result
from resolvent.cli.loading import JsonFile, wrong_usage
from resolvent.terminal import say, shell_word
from resolvent.training.config import check_paths
from resolvent.wording import counted


def tokenize(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tokens; new.", show_default=False)],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="File or folder with text, JSON Lines or Parquet (repeatable).",
            show_default="State of the Union addresses",
        ),
    ] = None,
    text_field: Annotated[
        str,
        typer.Option(metavar="NAME", help="Field of JSON objects, or column of Parquet files, that holds their text."),
    ] = "text",
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="bytes|bpe|gpt2|FILE", help="Bytes, a BPE trained on the data, GPT-2's, or a tokenizers file."
        ),
    ] = "bytes",
    vocab_size: Annotated[int, typer.Option(min=257, help="Tokens that bpe learns.")] = 8192,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the bytes to hold out; 0 for nothing, for --validation-data.")
    ] = 0.1,
    json_path: JsonFile = None,
) -> None:
    """Tokenize text once, for any number of runs on any machine.

    A folder of tokens takes the place of the text: resolvent train --data DIR --tokenizer DIR. If the command is
    stopped, the same command goes on.

    Example: [bold]resolvent tokenize --data novels/ --tokenizer gpt2 --out novels.tokens[/bold]
    """
    check_paths(data or [])
    from resolvent.data.cache import tokenize as tokenize_text

    with wrong_usage():
        folder = tokenize_text(
            data,
            out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            text_field=text_field,
            validation_fraction=validation_fraction or None,
            console=progress_console(json_path),
        )
    sizes = {
        name: {"tokens": len(stream.tokens), "documents": stream.num_documents, "bytes": stream.num_bytes}
        for name, stream in folder.streams.items()
    }
    write_result(json_path, {"out": str(out), "validation_fraction": folder.fraction, "streams": sizes})
    console = progress_console(json_path)
    for warning in folder.warnings:
        say(console, f"Note      {warning}")
    for name, size in sizes.items():
        say(
            console,
            f"{name:<9} {counted(size['tokens'], 'token')} of {counted(size['documents'], 'document')}, "
            f"{size['bytes']:,} bytes",
        )
    say(console, f"Train on it: resolvent train --data {shell_word(out)} --tokenizer {shell_word(out)}")
