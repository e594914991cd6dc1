"""`resolvent generate`."""

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.cli.console import print_text
from resolvent.cli.loading import Compile, Device, Directory, Weights, given_text, load_for_generation, sampling_options
from resolvent.runs import check_model, run_of
from resolvent.seeds import MOST_SEED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from resolvent.models import IntegratedModel


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default="the beginning of a text")] = "",
    prompt_file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="File with the text to continue; - for standard input.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to generate.")] = 256,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, help="Seed of the sampling.", show_default="random")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from the K likeliest tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Sample from the likeliest tokens with this total probability.", show_default="all"
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Sample from tokens at least this fraction as likely as the likeliest.",
            show_default="all",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(min=0, help="Above 1: penalises tokens of prompt and text.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(min=-2, max=2, help="Above 0: penalises tokens of the text.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(min=-2, max=2, help="Above 0: penalises tokens by their count in the text.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text (repeatable).", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts to generate from one reading of the prompt.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text during generation.")] = False,
    device: Device = "auto",
    weights: Weights = "full",
    compile: Compile = False,
) -> None:
    """Generate text with a trained model.

    Prints the prompt and the generated text, until the model ends the text or --max-new-tokens are generated. A prompt
    may have any length: invalid UTF-8 becomes U+FFFD. A prompt file is recognised by its content, as the files of
    --data are. A terminal shows control characters as escapes; files and pipes get them unchanged.

    Example: [bold]resolvent generate runs/tiny --prompt "My fellow" --max-new-tokens 200 --seed 1 --stream[/bold]
    """
    if prompt and prompt_file is not None:
        raise typer.BadParameter("the file holds the prompt; leave out --prompt", param_hint="--prompt-file")
    if "" in (stop or []):
        raise typer.BadParameter("a stop string must not be empty", param_hint="--stop")
    if stream and samples > 1:
        raise typer.BadParameter(
            "only a single text can be printed during generation; leave out --samples", param_hint="--stream"
        )
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    check_model(directory)
    sampling_options(**sampling)
    model, tokenizer = load_for_generation(directory, device, weights, compile)
    from resolvent.data.chat_template import end_tokens
    from resolvent.device import deterministic

    ends = end_tokens(run_of(directory), tokenizer)
    prompt = given_text(prompt_file, prompt)
    with deterministic(seed is not None):
        texts = _written(model, tokenizer, prompt, max_new_tokens, stop or [], seed, samples, sampling, ends)
        for number, pieces in enumerate(texts):
            if samples > 1:
                print_text("\n" * bool(number) + f"--- {number + 1} of {samples} ---\n")
            print_text(prompt)
            for piece in pieces if stream else ["".join(pieces)]:
                print_text(piece)
            print_text("\n")


def _written(
    model: "IntegratedModel",
    tokenizer: "Tokenizer",
    prompt: str,
    max_new_tokens: int,
    stop: list[str],
    seed: int | None,
    samples: int,
    sampling: dict[str, Any],
    ends: frozenset[int],
) -> Iterator[Iterator[str]]:
    """Yield the pieces of every text that follows the prompt; those of several texts are known at the end only.

    Text number i has the seed ``seed + i``.
    """
    import torch

    from resolvent.data.detokenization import decode_until
    from resolvent.data.encoding import Encoder
    from resolvent.data.stream import encode_prompt

    first = secrets.randbelow(MOST_SEED) if seed is None else seed
    ids = torch.from_numpy(encode_prompt(prompt, Encoder(tokenizer)))
    tokens = model.stream(
        ids[None].to(next(model.parameters()).device),
        max_new_tokens,
        samples=samples,
        seeds=[(first + i) % (MOST_SEED + 1) for i in range(samples)],
        eos_token_id=ends,
        **sampling,
    )
    if samples == 1:
        yield decode_until(tokenizer, (int(token) for token in tokens), ids[1:].tolist(), stop=stop, ends=ends)
        return
    drawn = [token.tolist() for token in tokens]
    for row in range(samples):
        yield decode_until(tokenizer, [token[row] for token in drawn], ids[1:].tolist(), stop=stop, ends=ends)
