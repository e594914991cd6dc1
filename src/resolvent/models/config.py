"""Base of the configurations: conversion to and from dictionaries, and faults reported together."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import typing
from collections.abc import Container, Mapping
from typing import Any, ClassVar, Protocol, Self

from ..errors import ConfigError
from ..fields import fits, kind_name, options_of
from ..files import shown
from ..wording import PYTHON, Notation

LARGEST = {"d_model": 1 << 20, "head_dim": 1 << 9, "n_layers": 1 << 10}
"""Upper limits of the sizes that cost time when a model is made, before any weight is read."""

Values = dict[str, Any]
"""Values of fields, by name."""

_LARGEST_INTEGER = 2**31 - 1
_LARGEST_FLOAT = 3.4e38  # of float32, in which models compute
_MOST_NAMED = 20


class LanguageModelConfig(Protocol):
    """The fields and methods that the configurations of both phases share."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_seq: int
    num_heads: int
    dropout: float
    backend: str

    @property
    def embedding_factor(self) -> float: ...

    @property
    def tie_embeddings(self) -> bool: ...

    def validate(self, notation: Notation = PYTHON) -> None: ...

    def to_dict(self) -> Values: ...


@dataclasses.dataclass
class ModelConfig:
    """Base of the configuration dataclasses.

    A subclass lists the rules for its values in ``_faults``; types are checked against the annotations.
    """

    listed_by: ClassVar[str] = ""
    """command that lists the fields of the subclass"""

    def validate(self, notation: Notation = PYTHON) -> None:
        """Check every field.

        Args:
            notation: of the values in messages: of the file that they come from.

        Raises:
            ConfigError: names every faulty field with its value.
        """
        if faults := self.faults(notation):
            raise ConfigError.of(self, faults)

    def faults(self, notation: Notation = PYTHON) -> list[str]:
        """Return a sentence for every wrong type, size or value.

        Rules are checked with the defaults in the place of values of a wrong type.
        """
        wrong = self._type_faults(notation)
        wrong |= self._with_defaults_for(wrong)._size_faults()
        return [*wrong.values(), *self._with_defaults_for(wrong)._faults()]

    def to_dict(self) -> Values:
        """Return a dictionary of all fields, nested configurations included; ``from_dict`` restores an equal object.

        Tuples are lists, as in JSON.
        """
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Values) -> Self:
        """Return the configuration that ``to_dict`` described.

        Raises:
            ConfigError: names every field that does not exist.
        """
        check_fields(cls, values)
        nested = {
            name: kind.from_dict(values[name])
            for name, kind in _nested_configs(cls).items()
            if isinstance(values.get(name), dict)
        }
        tuples = {name: tuple(values[name]) for name in _tuples(cls) if isinstance(values.get(name), list)}
        return cls(**{**values, **nested, **tuples})

    def _faults(self) -> list[str]:
        """Return a sentence for every rule that a value breaks; all types are right when this is called."""
        raise NotImplementedError

    def _with_defaults_for(self, names: Container[str]) -> Self:
        return dataclasses.replace(self, **{f.name: f.default for f in dataclasses.fields(self) if f.name in names})

    def _size_faults(self) -> dict[str, str]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: f"{name} must be <= {limit}, got {value}"
            for name, value in values.items()
            if isinstance(value, int) and value > (limit := LARGEST.get(name, _LARGEST_INTEGER))
        }

    def _type_faults(self, notation: Notation) -> dict[str, str]:
        hints = typing.get_type_hints(type(self))
        pairs = ((f.name, getattr(self, f.name), hints[f.name]) for f in dataclasses.fields(self))
        return {
            name: f"{name} must be {kind_name(kind, notation)}, got {notation.show(value)}"
            for name, value, kind in pairs
            if not fits(value, kind, _LARGEST_FLOAT)
        }


def check_fields(config: type[ModelConfig], values: Mapping[str, object]) -> None:
    """Raise a ConfigError that names every key of ``values`` without a field, and the field that it resembles."""
    names = [f.name for f in dataclasses.fields(config)]
    unknown = [key for key in values if key not in names]
    if not unknown:
        return
    named = [f"{shown(key)}{_nearest(key, names)}" for key in unknown[:_MOST_NAMED]]
    if left_out := len(unknown) - len(named):
        named.append(f"{left_out:,} more")
    listed = f"`{config.listed_by}` lists all" if config.listed_by else f"fields: {', '.join(names)}"
    raise ConfigError(f"unknown field of {config.__name__}: {', '.join(named)}; {listed}")


def _nearest(key: object, names: list[str]) -> str:
    """Return a question with up to three fields that a key resembles; "" where there are none."""
    near = difflib.get_close_matches(str(key)[:64], names, n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def field_descriptions(config: type[ModelConfig]) -> dict[str, str]:
    """Return the docstring of every field, or "" where its name says all."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    found = {field.name: "" for field in dataclasses.fields(config)}
    for statement, after in itertools.pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[statement.target.id] = " ".join(str(text).split())
    return {name: found[name] for name in (field.name for field in dataclasses.fields(config))}


def must_be_positive(config: ModelConfig, *names: str) -> list[str]:
    """Return a fault for every field that is not above zero."""
    return [f"{name} must be > 0, got {value}" for name in names if (value := getattr(config, name)) <= 0]


def must_be_at_least(config: ModelConfig, least: float, *names: str) -> list[str]:
    """Return a fault for every field below ``least``."""
    return [f"{name} must be >= {least:g}, got {value}" for name in names if (value := getattr(config, name)) < least]


def _nested_configs(cls: type) -> dict[str, type[ModelConfig]]:
    hints = typing.get_type_hints(cls)
    options = {f.name: options_of(hints[f.name]) for f in dataclasses.fields(cls)}
    found = {
        name: next((k for k in kinds if isinstance(k, type) and issubclass(k, ModelConfig)), None)
        for name, kinds in options.items()
    }
    return {name: kind for name, kind in found.items() if kind is not None}


def _tuples(cls: type) -> list[str]:
    """Return the names of the fields that are tuples, which JSON knows as lists."""
    hints = typing.get_type_hints(cls)
    return [name for name, kind in hints.items() if any(typing.get_origin(k) is tuple for k in options_of(kind))]
