"""`resolvent chat`."""

import importlib.util
import secrets
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import print_text
from resolvent.cli.loading import Compile, Device, Directory, Weights, load_for_generation, sampling_options
from resolvent.runs import check_model, run_of
from resolvent.seeds import MOST_SEED

_PROMPT = "> "


def chat(
    directory: Directory,
    system: Annotated[
        str, typer.Option(help="System message, which the model reads first.", show_default="nothing")
    ] = "",
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on with a saved conversation.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, help="Makes the answers repeatable.", show_default="random")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Lower is safer; 0 takes the likeliest token.")] = 0.8,
    max_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="Most tokens of an answer.")
    ] = 512,
    device: Device = "auto",
    weights: Weights = "full",
    compile: Compile = False,
) -> None:
    """Talk to a model.

    Each line is sent to the model, and the answer appears while it is written; /help lists the commands. The state is
    kept between turns, so a turn costs its own tokens, however long the conversation is. /save writes the state to a
    file, and --load reads it. Where standard input is no terminal, every line of it is sent.

    The chat template is taken from the run folder (chat_template.jinja or
    tokenizer_config.json); without one, lines that name the speakers stand between the turns.

    Example: [bold]resolvent chat runs/tiny --temperature 0.7[/bold]
    """
    check_model(directory)
    options = sampling_options(temperature=temperature)
    model, tokenizer = load_for_generation(directory, device, weights, compile)
    from resolvent.data.chat_template import ChatTemplate
    from resolvent.serving.chat import Chat
    from resolvent.serving.conversation import Conversation

    conversation = Conversation(
        model,
        tokenizer,
        ChatTemplate.load(run_of(directory), tokenizer),
        seed=secrets.randbelow(MOST_SEED) if seed is None else seed,
        options=options,
        max_tokens=max_tokens,
    )
    if system:
        conversation.set_system(system)
    if load is not None:
        conversation.load(load)
    chat = Chat(conversation)
    for line in _lines():
        _show(chat.respond(line))
        if chat.over:
            return


def _lines() -> Iterator[str]:
    """Yield what the user types, line by line, or the lines of standard input."""
    if not sys.stdin.isatty():
        yield from (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
        return
    if importlib.util.find_spec("readline") is not None:  # Windows has none
        importlib.import_module("readline")
    with suppress(EOFError):
        while True:
            yield input(_PROMPT)
    print()


def _show(pieces: Generator[str, None, None]) -> None:
    """Print an answer while it is written; Ctrl-C ends it. On a terminal, control characters are escaped."""
    try:
        for piece in pieces:
            print_text(piece)
    except KeyboardInterrupt:
        pieces.close()
        print()
