"""`resolvent generate`."""

import sys
from typing import Annotated

import typer

from resolvent.cli.loading import Device, Directory, given_text
from resolvent.runs import load_trained
from resolvent.seeds import MOST_SEED


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default="the beginning of a text")] = "",
    prompt_file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="File with the text to continue; - for standard input.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to generate.")] = 256,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, help="Seed of the text.", show_default="random")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from the K likeliest tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens with this total probability.", show_default="all"),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text during generation.")] = False,
    device: Device = "auto",
) -> None:
    """Generate text with a trained model.

    Prints the prompt and the generated text, until the model ends the text or --max-new-tokens are generated. A prompt
    may have any length: invalid UTF-8 becomes U+FFFD. A prompt file is recognised by its content, as the files of
    --data are. A terminal shows control characters as escapes; files and pipes get them unchanged.

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
    prompt = given_text(prompt_file, prompt)
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
    """Write text as UTF-8 and flush; control characters are escaped on a terminal."""
    from resolvent.terminal import for_terminal

    sys.stdout.buffer.write(for_terminal(text, sys.stdout).encode())
    sys.stdout.buffer.flush()
