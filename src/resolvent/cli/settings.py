"""The fields of `TrainingConfig` as options of a command, and a YAML file that gives them other defaults."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from resolvent.cli.loading import wrong_usage
from resolvent.seeds import MOST_SEED
from resolvent.training.config import BOUNDS, RUN, TEXT, TrainingConfig


def with_settings(command: Callable[..., Any]) -> Any:
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
                metavar=_metavar(field),
                show_default=rules.get("default_text", True),
            )
            if _is_list(field):  # several paths, each with an option of its own
                kind = list[str] | None
            keyword = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            parameters.append(keyword.replace(annotation=Annotated[kind, option]))
    command.__signature__ = signature.replace(parameters=parameters)  # pyrefly: ignore[missing-attribute]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _names(field: dataclasses.Field[Any]) -> list[str]:
    """Return the names of a field's option; it has no --no-... where it is off by default."""
    name = field.metadata.get("option", f"--{field.name.replace('_', '-')}")
    if field.default is True or bool in typing.get_args(field.type):
        name = f"{name}/--no-{name.removeprefix('--')}"
    return [name, *field.metadata.get("aliases", ())]


def _metavar(field: dataclasses.Field[Any]) -> str | None:
    """Return what stands for a value in the help: a name, or a type with its range, `INT [x>=1]`; None for others."""
    rules = field.metadata
    if "metavar" in rules:
        return rules["metavar"]
    kinds = {int, float} & {field.type, *typing.get_args(field.type)}
    known = [(sign, rules[rule]) for rule, (_, sign) in BOUNDS.items() if rule in rules]
    bounds = [f"x{sign}{bound:g}" for sign, bound in known if bound != MOST_SEED]  # which says nothing to a reader
    return f"{kinds.pop().__name__.upper()} [{', '.join(bounds)}]" if kinds and bounds else None


def _is_list(field: dataclasses.Field[Any]) -> bool:
    return list[str] in typing.get_args(field.type)


def _take_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Let the values of a YAML file take the place of the options' defaults."""
    if path is not None:
        from resolvent.training.config_file import SET, read_config_file

        with wrong_usage("--config"):
            values = read_config_file(path)
        if SET in values:
            values["change"] = [f"{name}={json.dumps(value)}" for name, value in values.pop(SET).items()]
        for field in dataclasses.fields(TrainingConfig):
            if _is_list(field) and isinstance(values.get(field.name), str):
                values[field.name] = [values[field.name]]
        context.default_map = values
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file with options, such as `steps: 1000`; those of the command line win.",
        is_eager=True,  # before the options whose defaults it gives
        callback=_take_defaults,
        rich_help_panel=RUN,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change the preset (repeatable).", rich_help_panel=TEXT),
]


def changes_of(context: typer.Context, change: list[str] | None) -> dict[str, Any]:
    """Return the fields of the model that the file and the command line set; those of the command line win."""
    return parse_assignments([*(context.default_map or {}).get("change", []), *(change or [])])


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


def refuse(context: typer.Context, settled: Iterable[str], beside: str, reason: str) -> None:
    """Name all options that were given beside one that has settled them."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if given := [names[name] for name in settled if is_given(context, name)]:
        raise typer.BadParameter(f"{reason}; leave out {', '.join(given)}", param_hint=beside)


def is_given(context: typer.Context, name: str) -> bool:
    """Return True if an option is on the command line, or in the file with another value than its default."""
    source = context.get_parameter_source(name)
    if source is None or source.name not in ("COMMANDLINE", "DEFAULT_MAP"):
        return False
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    return source.name == "COMMANDLINE" or context.params[name] != defaults.get(name)
