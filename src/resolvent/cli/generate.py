"""`resolvent generate`."""

import sys
from typing import Annotated

import typer

from resolvent.cli.loading import Device, Directory
from resolvent.runs import load_trained
from resolvent.seeds import MOST_SEED


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default="the beginning of a text")] = "",
    prompt_file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(
            metavar="FILE", help="File with the text to go on from; - for standard input.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to write.")] = 256,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, help="Makes the text repeatable.", show_default="random")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Lower is safer; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the K likeliest.", show_default="all")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest that hold this probability.", show_default="all")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is written.")] = False,
    device: Device = "auto",
) -> None:
    """Let a trained model write.

    Prints the prompt and what follows, until the model ends the text or --max-new-tokens are written. A prompt may have
    any length and hold any bytes: what is no UTF-8 becomes U+FFFD. A terminal shows control
    characters as escapes; files and pipes get them as they are.

    Example: [bold]resolvent generate runs/tiny --prompt "My fellow" --max-new-tokens 200 --seed 1 --stream[/bold]
    """
    if not 0 <= temperature < float("inf"):
        raise typer.BadParameter(f"{temperature} is not in the range 0<=x<inf.", param_hint="--temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise typer.BadParameter(f"{top_p} is not in the range 0<x<=1.", param_hint="--top-p")
    if prompt and prompt_file is not None:
        raise typer.BadParameter("the file holds the prompt; leave out --prompt", param_hint="--prompt-file")
    model, tokenizer = load_trained(directory, device)
    import torch

    from resolvent.data import EOT, encode_documents
    from resolvent.data.detokenization import decode_stream
    from resolvent.device import deterministic

    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    # What the shell passed as bytes, or what the file holds, as text.
    read = prompt_file.read() if prompt_file is not None else prompt.encode("utf-8", "surrogateescape")
    prompt = read.decode("utf-8", "replace")
    end = tokenizer.token_to_id(EOT)
    ids = torch.from_numpy(encode_documents([prompt], tokenizer).tokens[:-1].astype("int64"))
    tokens = model.stream(
        ids[None].to(next(model.parameters()).device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        eos_token_id=end,
    )
    new_ids = (int(token) for token in tokens)
    pieces = decode_stream(tokenizer, (token for token in new_ids if token != end), ids[1:].tolist())
    _print(prompt)
    with deterministic(seed is not None):
        for piece in pieces if stream else ["".join(pieces)]:
            _print(piece)
    _print("\n")


def _print(text: str) -> None:
    """Write text as UTF-8, whatever the terminal claims to be, and at once; a terminal obeys none of it."""
    from resolvent.terminal import for_terminal

    sys.stdout.buffer.write(for_terminal(text, sys.stdout).encode())
    sys.stdout.buffer.flush()
