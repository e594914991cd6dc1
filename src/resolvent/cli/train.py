"""`resolvent train`, whose options are the fields of `TrainingConfig`."""

import dataclasses
import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.cli.console import progress_console, write_result
from resolvent.cli.loading import JsonFile, wrong_usage
from resolvent.terminal import discard_output, say, shell_word
from resolvent.training.config import RUN, SAVED_WITH_A_MODEL, TEXT, TrainingConfig

if TYPE_CHECKING:
    from rich.console import Console

    from resolvent.models.phase1 import Phase1Config
    from resolvent.models.phase2 import Phase2Config
    from resolvent.training import TrainingResult

_MOVABLE = ("data", "validation_data")
"""Settings of a run that may be given again when it resumes: the paths of its text."""


def _with_settings(command: Any) -> Any:
    """Replace the `**settings` of a command by an option for every field of `TrainingConfig`."""
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for field in dataclasses.fields(TrainingConfig):
        rules, kind = field.metadata, typing.cast(Any, field.type)
        if "help" in rules:
            option = typer.Option(
                *_names(field),
                help=rules["help"],
                rich_help_panel=rules["group"],
                metavar=rules.get("metavar"),
                show_default=rules.get("default_text", True),
            )
            if list[str] in typing.get_args(kind):  # several paths, one option per path
                kind = list[str] | None
            keyword = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            parameters.append(keyword.replace(annotation=Annotated[kind, option]))
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _names(field: dataclasses.Field[Any]) -> list[str]:
    """Return the names of a field's option, which has no --no-... where it is off by default."""
    name = field.metadata.get("option", f"--{field.name.replace('_', '-')}")
    if field.default is True:
        name = f"{name}/--no-{name.removeprefix('--')}"
    return [name, *field.metadata.get("aliases", ())]


@_with_settings
def train(
    context: typer.Context,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Resume the run in DIR.", rich_help_panel=RUN)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the run folder.", rich_help_panel=RUN)
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the preset (repeatable).", rich_help_panel=TEXT),
    ] = None,
    json_path: JsonFile = None,
    **settings: Any,
) -> None:
    """Train a model on text.

    Ctrl-C saves a checkpoint, and --resume continues from it exactly. Beside --resume, --data names the new path of a
    text that was moved, and --steps changes the number of steps.

    Example: [bold]resolvent train --data novel.txt --tokenizer bpe --vocab-size 2048 --out runs/novel[/bold]
    """
    settings |= {name: paths[0] for name in _MOVABLE if (paths := settings[name]) is not None and len(paths) == 1}
    config = TrainingConfig(**settings)
    if resume is not None:
        settled = [name for name in settings if name not in ("device", "tracker", "steps", "cache", *_MOVABLE)]
        _refuse(context, [*settled, "change", "overwrite"], "--resume", "the run keeps its settings")
    elif config.start_from is not None:
        settled = [*SAVED_WITH_A_MODEL, "change"]
        _refuse(context, settled, "--from", "the model brings its sizes and its tokenizer along")
    if config.tokenizer != "bpe":
        _refuse(context, ["vocab_size"], "--tokenizer", f"{config.tokenizer} has tokens of its own")
    with wrong_usage():
        config.validate()
        if resume is None and config.start_from is None:
            chosen = _chosen_model(config.phase, str(config.preset), change or [])
            if change:
                config.model, config.preset = chosen, None
    from resolvent import training
    from resolvent.training.run_folder import has_begun

    console = _console(json_path)
    run_dir = resume or config.run_dir
    try:
        with training.terminable():
            if resume is not None:
                device = None if config.device == "auto" else config.device
                given = {name: settings[name] for name in (*_MOVABLE, "cache") if settings[name] is not None}
                if config.tracker != "none":
                    given["tracker"] = config.tracker
                if _is_given(context, "steps"):
                    given["steps"] = config.steps
                result = training.resume(resume, device=device, console=console, **given)
            else:
                result = training.train(config, overwrite=overwrite, console=console)
    except (training.TrainingInterrupted, KeyboardInterrupt) as stop:
        number = getattr(stop, "signal_number", signal.SIGINT)
        go_on = f" Go on with: resolvent train --resume {shell_word(run_dir)}" if has_begun(run_dir) else ""
        try:
            say(console, f"Stopped.{go_on}")
            sys.stdout.flush()
        except OSError:  # the terminal was closed
            discard_output()
        raise typer.Exit(128 + number) from None
    if int(os.environ.get("RANK", "0")) == 0:  # one of the processes that torchrun started prints
        write_result(json_path, _summary(result))
        say(console, f"Generate text: resolvent generate {shell_word(result.run_dir)} --prompt 'The' --stream")


def _console(json_path: Path | None) -> "Console":
    """Return the console for progress. If its reader closes, the run saves a checkpoint and stops, as after SIGTERM."""
    console = progress_console(json_path)

    def stop() -> None:
        console.quiet = True
        discard_output()
        signal.raise_signal(signal.SIGTERM)

    console.on_broken_pipe = stop
    return console


def _summary(result: "TrainingResult") -> dict[str, Any]:
    """Return the figures of a finished run."""
    return {
        "run_dir": str(result.run_dir),
        "parameters": result.model.num_parameters(),
        "validation": dataclasses.asdict(result.validation),
    }


def _refuse(context: typer.Context, settled: Iterable[str], beside: str, reason: str) -> None:
    """Refuse options that another option excludes, and name them all."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if given := [names[name] for name in settled if _is_given(context, name)]:
        raise typer.BadParameter(f"{reason}; leave out {', '.join(given)}", param_hint=beside)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _chosen_model(phase: int, preset: str, assignments: list[str]) -> "Phase1Config | Phase2Config":
    """Return a preset with some fields replaced, each given as FIELD=VALUE."""
    from resolvent.models.phases import PHASES

    values = PHASES[phase].preset(preset).to_dict() | parse_assignments(assignments)
    config = PHASES[phase].config.from_dict(values)
    config.validate()
    return config


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Return fields of a configuration, each given as FIELD=VALUE."""
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
    """Return a number, true, false or null as in JSON; anything else is text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # no JSON, thousands of digits, thousands of brackets
        return value
