"""`resolvent train`, whose options are the fields of `TrainingConfig`."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.training.config import RUN, TEXT, TrainingConfig

if TYPE_CHECKING:
    from resolvent.models.phase2 import Phase2Config


def train(context: typer.Context, resume: Path | None, set: list[str] | None, **fields: Any) -> None:
    """Train a model on text.

    Ctrl-C saves a checkpoint, and --resume goes on from there as if nothing had happened.

    Example: [bold]resolvent train --data novel.txt --tokenizer bpe --vocab-size 2048 --out runs/novel[/bold]
    """
    if resume is not None:
        _refuse_options_beside_resume(context)
    elif set:
        fields |= {"model": _changed_preset(fields["preset"], set), "preset": None}
    from rich.console import Console

    from resolvent import training

    console = Console()
    try:
        if resume is not None:
            result = training.resume(resume, device=context.params["device"], console=console)
        else:
            result = training.train(TrainingConfig(**fields), console=console)
    except training.TrainingInterrupted as stop:
        console.print(f"Saved step {stop.step}. Go on with: resolvent train --resume {stop.run_dir}", highlight=False)
        raise typer.Exit(128 + stop.signal_number) from None
    console.print(f"Let it write: resolvent generate {result.run_dir} --prompt 'The'", highlight=False)


def _refuse_options_beside_resume(context: typer.Context) -> None:
    """A resumed run is the run that it was; only the device may be another."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ("resume", "device") and context.get_parameter_source(name).name == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(
            f"a resumed run keeps its settings: leave out {', '.join(given)}", param_hint="--resume"
        )


def _changed_preset(preset: str, assignments: list[str]) -> "Phase2Config":
    """A preset with some fields replaced, each given as NAME=VALUE."""
    from resolvent.models.phase2 import Phase2Config, get_phase2_preset

    values = get_phase2_preset(preset).to_dict()
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"{assignment!r} is not NAME=VALUE", param_hint="--set")
        values[name] = _parse(value)
    config = Phase2Config.from_dict(values)
    config.validate()
    return config


def _parse(value: str) -> Any:
    """A number, true, false or null as in JSON; anything else is text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _signature() -> inspect.Signature:
    """The options, as typer reads them off a function: --resume, the fields of the configuration, and --set."""
    resume = typer.Option(metavar="DIR", help="Go on with the run in DIR, with its settings.", rich_help_panel=RUN)
    change = typer.Option(metavar="NAME=VALUE", help="Change a field of the preset (repeatable).", rich_help_panel=TEXT)
    options: dict[str, tuple[Any, Any]] = {"resume": (None, Annotated[Path | None, resume])}
    for field in dataclasses.fields(TrainingConfig):
        rules = field.metadata
        if "help" in rules:
            option = typer.Option(
                help=rules["help"],
                rich_help_panel=rules["group"],
                metavar=rules.get("metavar"),
                show_default=rules.get("default_text", True),
            )
            options[field.name] = (field.default, Annotated[field.type, option])
    options["set"] = (None, Annotated[list[str] | None, change])
    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (default, annotation) in options.items()
    ]
    return inspect.Signature([context, *parameters])


train.__signature__ = _signature()
train.__annotations__ = {name: parameter.annotation for name, parameter in train.__signature__.parameters.items()}
