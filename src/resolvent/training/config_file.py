"""A run described by a YAML file, whose keys are the options of `resolvent train`.

The file is a third view of a `TrainingConfig`, beside the command line and `training.json`: its keys, their types and
their bounds are those of the fields. `set` holds fields of the model, as the option of that name.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import read_bytes, shown, truncated
from resolvent.training.config import SAVED_WITH_A_MODEL, TrainingConfig, changed_preset, faults_of, option_names
from resolvent.wording import JSON

SET = "set"
"""Key of the fields of the model that differ from the preset's."""

_FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig) if "help" in field.metadata}
_KEYS = {name: field.name for field in _FIELDS.values() for name in option_names(field)} | {SET: SET}
"""Field that each key stands for."""

_MOST_BYTES = 1 << 20


def _as_yaml(value: object) -> str:
    """Return a value as a line of YAML; where YAML does not know its type, its repr."""
    try:
        line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    except yaml.YAMLError:
        return shown(value)
    return truncated(line.removesuffix("\n...\n").strip())


YAML = JSON._replace(show=_as_yaml)
"""Notation of the values in messages about a YAML file."""


class _Loader(yaml.SafeLoader):
    """Safe loading, with the numbers of YAML 1.2, and without aliases, which let a short file fill the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer that is the same in YAML 1.1 and 1.2: in the former 010 is 8, and 1:30 is 90."""
        if re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", node.value):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is no decimal integer", problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# To PyYAML, `1e-3` is a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+"), list("-+.0123456789")
)


def load_config(path: str | Path) -> TrainingConfig:
    """Return the run that a YAML file describes; what the file leaves out has its default.

    Raises:
        ConfigError: the file cannot be read, or values are wrong; the error names file, line and key.
    """
    values = read_config_file(Path(path))
    changes = values.pop(SET, {})
    config = TrainingConfig(**values)
    if changes:
        config.model, config.preset = changed_preset(config.phase, str(config.preset), changes), None
    config.validate(YAML)
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the values of a YAML file by field, and under `SET` those for fields of the model.

    Raises:
        ConfigError: lists all faults at once, each with file, line and key.
    """
    try:
        text = read_bytes(path, _MOST_BYTES).decode()
    except (OSError, ValueError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {path}: {reason}") from error
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_problem(error)}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} must hold `option: value` lines, such as `steps: 1000`")
    values: dict[str, Any] = {}
    faults: list[tuple[int, str]] = []
    changes: dict[str, Any] = {}
    places: dict[str, int] = {}
    for key, node in root.value:
        name = _KEYS.get(_key(key))
        found = [*_key_faults(key, name, values)]
        if name is not None and not found:
            values[name], found = _read_value(name, node)
        faults += [(key.start_mark.line + 1, fault) for fault in found]
        if name == SET and not found:
            changes = values[SET]
            places = {field.value: field.start_mark.line + 1 for field, _ in node.value}
    faults += [(places[field], fault) for field, fault in _model_faults(values, changes)]
    if faults:
        raise ConfigError("\n".join(f"{path}, line {line}: {fault}" for line, fault in sorted(faults)))
    return values


def dump_config(config: TrainingConfig) -> str:
    """Return the YAML file of a run, with the help of every option as a comment; `load_config` restores the run."""
    values, changes = config.to_dict(), {}
    if config.model is not None:
        values["preset"], changes = _nearest_preset(config)
    lines, group = [], None
    for field in _FIELDS.values():
        if config.start_from is not None and field.name in SAVED_WITH_A_MODEL:
            continue
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += [f"\n# {group}"]
        lines.append(f"{_entry(option_names(field)[0], values[field.name])}  # {_comment(field)}")
        if field.name == "preset":
            lines += [_entry(SET, changes)] if changes else []
    return "\n".join(lines).lstrip() + "\n"


def _key(node: yaml.Node) -> str:
    """Return a key with the underscores of fields, where it has the dashes of options."""
    return node.value.replace("-", "_") if isinstance(node, yaml.ScalarNode) else ""


def _read_value(name: str, node: yaml.Node) -> tuple[Any, list[str]]:
    """Return the value of a field and what is wrong with it."""
    loader = _Loader("")
    try:
        value = loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        return None, [f"{name} has a value that cannot be read: {_problem(error)}"]
    finally:
        loader.dispose()
    if name != SET:
        return value, [*faults_of(_FIELDS[name], value, YAML)]
    if isinstance(value, dict) and all(isinstance(field, str) for field in value):
        return value, []
    return value, [f"{SET} must hold `field: value` lines of the model, got {YAML.show(value)}"]


def _model_faults(values: dict[str, Any], changes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the fields under `SET`, each fault with the field that it belongs to."""
    phase, preset = values.get("phase", TrainingConfig.phase), values.get("preset", TrainingConfig.preset)
    try:
        chosen = changed_preset(phase, str(preset), {})
    except (ConfigError, KeyError, TypeError):  # a fault of these two, which is named with their lines or by `validate`
        return
    known = dict(changes)
    for field in changes:
        try:
            changed_preset(phase, str(preset), {field: getattr(chosen, field, None)})
        except ConfigError as error:
            yield field, str(error)
            del known[field]
    for fault in type(chosen).from_dict(chosen.to_dict() | known).faults(YAML):
        yield next((field for field in known if field in fault.split()), next(iter(known))), fault


def _key_faults(key: yaml.Node, name: str | None, values: dict[str, Any]) -> Iterator[str]:
    if name is None:
        near = difflib.get_close_matches(_key(key), _KEYS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "`resolvent train --help` lists all; without the dashes"
        text = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
        yield f"unknown key {shown(text)}: {remedy}"
    elif name in values:
        yield f"{key.value} is given twice"


def _nearest_preset(config: TrainingConfig) -> tuple[str, dict[str, Any]]:
    """Return the preset that a model differs least from, and the fields in which it does."""
    from resolvent.models.phases import PHASES

    phase, model = PHASES[config.phase], config.model
    assert model is not None
    differences = {}
    for name in phase.presets:
        preset = phase.preset(name).to_dict()
        values = model.to_dict()
        del values["vocab_size"]  # the tokenizer's
        differences[name] = {field: value for field, value in values.items() if value != preset[field]}
    name = min(differences, key=lambda name: len(differences[name]))
    return name, json.loads(json.dumps(differences[name]))  # lists in the place of tuples, which safe YAML lacks


def _problem(error: Exception) -> str:
    return " ".join(str(error).split())


def _entry(key: str, value: Any) -> str:
    """Return a line of YAML."""
    line = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=math.inf)
    return line.strip()[1:-1]  # without the braces


def _comment(field: dataclasses.Field[Any]) -> str:
    default = field.metadata.get("default_text")
    return field.metadata["help"] + (f" null: {default}." if default else "")
