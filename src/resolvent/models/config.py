"""What the configurations of all models share: dictionaries, unknown fields, and faults that are reported together."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Container, Mapping
from typing import Any, Protocol, Self

from ..errors import ConfigError
from ..files import shown

LARGEST = {"d_model": 1 << 20, "head_dim": 1 << 9, "n_layers": 1 << 10}
"""Sizes that decide what is computed when a model is made, before any weight is looked at."""

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

    def validate(self) -> None: ...

    def to_dict(self) -> Values: ...


@dataclasses.dataclass
class ModelConfig:
    """Base of the configuration dataclasses.

    A subclass lists its rules in ``_faults``; types are checked from the annotations.
    """

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: names every faulty field with its value.
        """
        if faults := self.faults():
            raise ConfigError.of(self, faults)

    def faults(self) -> list[str]:
        """What is wrong with types, sizes and rules, which make sense only for values of the right type: they are
        checked with the defaults in the place of the others."""
        wrong = self._type_faults()
        wrong |= self._with_defaults_for(wrong)._size_faults()
        return [*wrong.values(), *self._with_defaults_for(wrong)._faults()]

    def to_dict(self) -> Values:
        """Plain dictionary of all fields, nested configurations included; ``from_dict`` restores an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Values) -> Self:
        """The configuration that ``to_dict`` described.

        Raises:
            ConfigError: names every field that does not exist.
        """
        check_fields(cls, values)
        nested = {
            name: kind.from_dict(values[name])
            for name, kind in _nested_configs(cls).items()
            if isinstance(values.get(name), dict)
        }
        return cls(**{**values, **nested})

    def _faults(self) -> list[str]:
        """Every rule that a value breaks; all types are right when this is called."""
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

    def _type_faults(self) -> dict[str, str]:
        hints = typing.get_type_hints(type(self))
        pairs = ((f.name, getattr(self, f.name), hints[f.name]) for f in dataclasses.fields(self))
        return {
            name: f"{name} must be {_say(kind)}, got {shown(value)}"
            for name, value, kind in pairs
            if not _fits(value, kind)
        }


def check_fields(config: type[ModelConfig], values: Mapping[str, object]) -> None:
    """Raise a ConfigError that names every key of ``values`` which is no field, and the field it resembles."""
    names = [f.name for f in dataclasses.fields(config)]
    unknown = [key for key in values if key not in names]
    if not unknown:
        return
    hints = {key: difflib.get_close_matches(str(key)[:64], names, n=1) for key in unknown[:_MOST_NAMED]}
    told = [shown(key) + (f" (did you mean {hint[0]!r}?)" if hint else "") for key, hint in hints.items()]
    if left_out := len(unknown) - len(told):
        told.append(f"{left_out:,} more")
    raise ConfigError(f"unknown field of {config.__name__}: {', '.join(told)}. Fields: {', '.join(names)}")


def must_be_positive(config: ModelConfig, *names: str) -> list[str]:
    """Faults of the fields that are not above zero."""
    return [f"{name} must be > 0, got {value}" for name in names if (value := getattr(config, name)) <= 0]


def must_be_at_least(config: ModelConfig, least: float, *names: str) -> list[str]:
    """Faults of the fields that are below ``least``."""
    return [f"{name} must be >= {least:g}, got {value}" for name in names if (value := getattr(config, name)) < least]


def _nested_configs(cls: type) -> dict[str, type[ModelConfig]]:
    hints = typing.get_type_hints(cls)
    options = {f.name: _options(hints[f.name]) for f in dataclasses.fields(cls)}
    found = {
        name: next((k for k in kinds if isinstance(k, type) and issubclass(k, ModelConfig)), None)
        for name, kinds in options.items()
    }
    return {name: kind for name, kind in found.items() if kind is not None}


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    def fits_one(option: Any) -> bool:
        if option is float:
            # Compared, not converted: an integer may be too large for a float.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return is_number and abs(value) <= _LARGEST_FLOAT
        if option is int:
            return isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, option)

    return any(fits_one(option) for option in _options(kind))


def _say(kind: Any) -> str:
    names = {float: "a finite number", int: "an integer", bool: "True or False", str: "a string", type(None): "None"}
    return " or ".join(names.get(option, getattr(option, "__name__", str(option))) for option in _options(kind))
