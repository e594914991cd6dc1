"""`resolvent train`, whose options are the fields of `TrainingConfig`."""

import dataclasses
import inspect
import json
import os
import signal
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.training.config import RUN, SAVED_WITH_A_MODEL, TEXT, TrainingConfig
from resolvent.training.record import has_begun

if TYPE_CHECKING:
    from rich.console import Console

    from resolvent.models.phase1 import Phase1Config
    from resolvent.models.phase2 import Phase2Config

_MOVABLE = ("data", "validation_data")
"""Settings of a run that may be given again when it resumes: where its text is now."""


def _with_settings(command: Any) -> Any:
    """Replace the `**settings` of a command by an option for every field of `TrainingConfig`."""
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for field in dataclasses.fields(TrainingConfig):
        rules, kind = field.metadata, typing.cast(Any, field.type)
        if "help" in rules:
            option = typer.Option(
                *filter(None, [rules.get("option")]),
                help=rules["help"],
                rich_help_panel=rules["group"],
                metavar=rules.get("metavar"),
                show_default=rules.get("default_text", True),
            )
            keyword = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            parameters.append(keyword.replace(annotation=Annotated[kind, option]))
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@_with_settings
def train(
    context: typer.Context,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in DIR.", rich_help_panel=RUN)
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the preset (repeatable).", rich_help_panel=TEXT),
    ] = None,
    **settings: Any,
) -> None:
    """Train a model on text.

    Ctrl-C saves a checkpoint, and --resume goes on from there as if nothing had happened. If the text has moved, --data
    beside it says where to.

    Example: [bold]resolvent train --data novel.txt --tokenizer bpe --vocab-size 2048 --out runs/novel[/bold]
    """
    config = TrainingConfig(**settings)
    if resume is not None:
        settled = [name for name in settings if name not in ("device", "tracker", *_MOVABLE)]
        _refuse(context, [*settled, "change"], "--resume", "the run keeps its settings")
    elif config.start_from is not None:
        settled = [*SAVED_WITH_A_MODEL, "change"]
        _refuse(context, settled, "--from", "the model brings its sizes and its tokenizer along")
    elif change:
        config.model, config.preset = _changed_preset(config.phase, str(config.preset), change), None
    if config.tokenizer != "bpe":
        _refuse(context, ["vocab_size"], "--tokenizer", f"{config.tokenizer} has tokens of its own")
    from rich.console import Console

    from resolvent import training

    console = Console()
    run_dir = resume or config.run_dir
    try:
        with training.terminable():
            if resume is not None:
                device = None if config.device == "auto" else config.device
                given = {name: settings[name] for name in _MOVABLE if settings[name] is not None}
                if config.tracker != "none":
                    given["tracker"] = config.tracker
                result = training.resume(resume, device=device, console=console, **given)
            else:
                result = training.train(config, console=console)
    except (training.TrainingInterrupted, KeyboardInterrupt) as stop:
        number = signal.SIGTERM if isinstance(stop, training.Terminated) else signal.SIGINT
        if isinstance(stop, training.TrainingInterrupted):
            number = stop.signal_number
        begun = has_begun(run_dir)
        _say(console, f"Stopped. Go on with: resolvent train --resume {run_dir}" if begun else "Stopped.")
        raise typer.Exit(128 + number) from None
    if int(os.environ.get("RANK", "0")) == 0:  # of the processes that torchrun started, one speaks
        _say(console, f"Let it write: resolvent generate {result.run_dir} --prompt 'The' --stream")


def _say(console: "Console", text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _refuse(context: typer.Context, settled: Iterable[str], beside: str, reason: str) -> None:
    """Name all options that were given beside one that has settled them."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in settled}
    given = [names[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise typer.BadParameter(f"{reason}; leave out {', '.join(given)}", param_hint=beside)


def _changed_preset(phase: int, preset: str, assignments: list[str]) -> "Phase1Config | Phase2Config":
    """A preset with some fields replaced, each given as FIELD=VALUE."""
    from resolvent.models.phases import PHASES

    values = PHASES[phase].preset(preset).to_dict() | parse_assignments(assignments)
    return PHASES[phase].config.from_dict(values)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Fields of a configuration, each given as FIELD=VALUE."""
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"{assignment!r} is not FIELD=VALUE", param_hint="--set")
        if name == "vocab_size":
            raise typer.BadParameter("the tokenizer decides vocab_size; see --tokenizer", param_hint="--set")
        values[name] = _parse(value)
    return values


def _parse(value: str) -> Any:
    """A number, true, false or null as in JSON; anything else is text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
