"""`resolvent serve`."""

from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import report_console
from resolvent.cli.loading import Compile, Device, Directory, Weights, load_for_generation, wrong_usage
from resolvent.runs import check_model, run_of
from resolvent.terminal import say


def serve(
    directory: Directory,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with API keys, one a line.", show_default="no key is asked for"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="that of the run folder")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Most answers at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Most requests that wait.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 131_072,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Most time for an answer, waiting included.")] = 600.0,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memory for the states after beginnings of prompts.")] = 1024,
    prefix_cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep these states on disk, too, for the next start and for other servers.",
            show_default="in memory only",
        ),
    ] = None,
    prefix_cache_dir_mb: Annotated[int, typer.Option(min=1, help="Most disk space for them.")] = 10_240,
    device: Device = "auto",
    weights: Weights = "full",
    compile: Compile = False,
) -> None:
    """Serve a model over HTTP with the OpenAI API.

    Clients of that API take http://HOST:PORT/v1 as base URL: /v1/completions, /v1/chat/completions and /v1/models;
    beside them are /health and /metrics. Requests are answered together, and a beginning that prompts have in common is
    read once. SIGTERM and Ctrl-C wait for the answers that were begun.

    Without --api-key-file, the server answers requests of this machine only.

    Example: [bold]resolvent serve runs/tiny --port 8000[/bold]
    """
    check_model(directory)
    from resolvent.errors import ConfigError

    try:
        from resolvent.serving.api import Limits, Service
        from resolvent.serving.server import check_address, listen, read_keys, run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs {(error.name or '').partition('.')[0]}: pip install 'resolvent[serve]'"
        ) from error
    from resolvent.data.chat_template import ChatTemplate
    from resolvent.serving.engine import BLOCK, Engine
    from resolvent.serving.state_files import StateFiles

    keys = None
    with wrong_usage("--api-key-file"):
        if api_key_file is not None:
            keys = read_keys(api_key_file)
    with wrong_usage("--host"):
        check_address(host, has_keys=keys is not None)
    model, tokenizer = load_for_generation(directory, device, weights, compile)
    run_dir, files = run_of(directory), None
    if prefix_cache_dir is not None:
        with wrong_usage("--prefix-cache-dir"):
            files = StateFiles(prefix_cache_dir, model, block=BLOCK, most_bytes=prefix_cache_dir_mb << 20)
    service = Service(
        Engine(model, max_sequences=max_sequences, max_queue=max_queue, cache_bytes=cache_mb << 20, files=files),
        tokenizer,
        ChatTemplate.load(run_dir, tokenizer),
        name if name is not None else run_dir.resolve().name,
        limits=Limits(prompt_tokens=max_prompt_tokens, new_tokens=max_new_tokens, seconds=max_seconds),
        keys=keys,
        hosts=list(dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))),
    )
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/v1"
    text = f"{service.name} answers at {address}; Ctrl-C ends it when the answers are complete"
    run(service.application(), listener, drain_seconds=max_seconds, ready=lambda: say(report_console(None), text))
