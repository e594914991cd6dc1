"""The text of a command: options that name it, and its tokens."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from resolvent.runs import RUN_FILE, run_of
from resolvent.terminal import shell_word

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer

    from resolvent.data import TokenStream
    from resolvent.training.config import TrainingConfig

Text = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="File or folder with text, JSON Lines or Parquet (repeatable).",
        show_default="the part that the run held out",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="NAME",
        help="Field of JSON objects, or column of Parquet files, that holds the text of --data.",
        show_default="text; with --held-out, the run's",
    ),
]
HeldOut = Annotated[bool, typer.Option("--held-out", help="Read only the part of --data that the run held out.")]
Format = Annotated[
    Literal["text", "chat"] | None,
    typer.Option(
        "--format",
        help="chat: --data are conversations, JSON records with `messages`, and only the assistant's answers are "
        "scored.",
        show_default="text; without --data or with --held-out, the run's",
    ),
]


class TextOptions(NamedTuple):
    """Options that choose a text.

    Attributes:
        data: paths; None for the held-out part of the text that the run learned from.
        text_field: field of records that holds their text; None for "text"; with `held_out`, the run's.
        held_out: take only the part of `data` that the run held out.
        format: `text` or `chat`; None for "text", or for the run's where the run says which text it is.
    """

    data: list[str] | None = None
    text_field: str | None = None
    held_out: bool = False
    format: Literal["text", "chat"] | None = None

    def __str__(self) -> str:
        if self.data is None:
            return "its held-out documents"
        return f"held-out documents of {', '.join(self.data)}" if self.held_out else ", ".join(self.data)

    def check(self) -> None:
        """Check, before heavy imports, that the options go together and that the paths exist.

        Raises:
            ConfigError: an option has no effect beside the others.
            DataError: a path is missing.
        """
        from resolvent.errors import ConfigError
        from resolvent.training.config import check_paths

        if self.data is None and self.text_field is not None:
            raise ConfigError("--text-field selects a field of a text: name the text with --data")
        if self.data is None and self.format is not None:
            raise ConfigError("--format says how to read a text: name the text with --data")
        if self.held_out and self.format is not None:
            raise ConfigError("--held-out reads the text in the format of the run: leave out --format")
        if self.format == "chat" and self.text_field is not None:
            raise ConfigError("conversations have their field, messages: leave out --text-field")
        check_paths(self.data or [])


def read_tokens(directory: Path, tokenizer: "Tokenizer", text: TextOptions, console: "Console") -> "TokenStream":
    """Return the tokens of a text.

    Without paths, the text is the one that the run folder names, of which the run's held-out part is returned. It is
    used only if its tokens have the fingerprint that the run stored: a run folder from elsewhere could otherwise put a
    private file of the user on a page.

    Args:
        directory: a run folder, or a checkpoint in it.
        tokenizer: of the model.
        text: the options of the command.
        console: shows which text is read where the command does not name it.

    Raises:
        ConfigError: options that have no effect, or `--held-out` for a run that held nothing out.
        CheckpointError: no text is named, or the run's text has changed.
        DataError: text that cannot be read.
    """
    from resolvent.data import encode_documents, load_documents
    from resolvent.data.chat_template import ChatTemplate
    from resolvent.data.conversations import Conversations
    from resolvent.data.encoding import Encoder

    text.check()
    if text.data is None:
        return _held_out_of_run(directory, tokenizer, console)
    if text.held_out:
        return _held_out_of(text.data, text.text_field, directory, tokenizer)
    if text.format == "chat":
        template = ChatTemplate.load(run_of(directory), tokenizer)
        return Conversations(text.data, template).stream(Encoder(tokenizer).separator)
    documents = load_documents(text.data, text_field="text" if text.text_field is None else text.text_field)
    return encode_documents(documents, tokenizer, progress=True)


def _held_out_of_run(directory: Path, tokenizer: "Tokenizer", console: "Console") -> "TokenStream":
    """Return the held-out part of the text that a run folder names."""
    from resolvent.errors import CheckpointError, DataError
    from resolvent.terminal import say
    from resolvent.training.corpus import check_fingerprint, in_folder, load_corpus, text_name
    from resolvent.training.run_folder import read_run

    run_dir = run_of(directory)
    if not (run_dir / RUN_FILE).exists():
        raise CheckpointError(f"{run_dir} does not say what it was trained on: name a text with --data")
    config, fingerprint = read_run(run_dir)
    apart = config.validation_data is not None
    name = text_name(config.validation_data if apart else config.data)
    say(console, f"Reading   {name if apart else f'the held-out part of {name}'}")
    options = _options_of(config)
    try:
        corpus = load_corpus(in_folder(config, run_dir), tokenizer, template_folder=run_dir, console=console)
    except DataError as error:
        raise DataError(f"{error}; if the text was moved, name its new path: {options}") from error
    remedy = f"restore the text, or read it as it is now: {options}"
    check_fingerprint(corpus, fingerprint, config, run_dir, remedy=remedy)
    return corpus.validation


def _options_of(config: "TrainingConfig") -> str:
    """Return the options that name the held-out text of a run at another path."""
    if config.validation_data is None:
        return "--data PATH --held-out"
    field = "" if config.text_field == "text" else f" --text-field {shell_word(config.text_field)}"
    return f"--data PATH{field}"


def _held_out_of(data: list[str], text_field: str | None, directory: Path, tokenizer: "Tokenizer") -> "TokenStream":
    """Return the part of a text that a run holds out of it."""
    from resolvent.errors import ConfigError
    from resolvent.training.corpus import in_folder, load_corpus
    from resolvent.training.run_folder import read_run

    run_dir = run_of(directory)
    config, _ = read_run(run_dir)
    if config.validation_data is not None:
        raise ConfigError(f"{run_dir} held nothing out: it validated on a text of its own; leave out --held-out")
    field = config.text_field if text_field is None else text_field
    config = dataclasses.replace(in_folder(config, run_dir), data=data, text_field=field)
    return load_corpus(config, tokenizer, template_folder=run_dir).validation
