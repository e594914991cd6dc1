"""Types of a configuration's fields: which values are of a type, and what messages call it."""

import types
import typing
from typing import Any

from resolvent.wording import Notation

Kind = Any
"""Type of a field: a class, a union, a literal, a tuple of integers or a list of strings."""


def options_of(kind: Kind) -> tuple[Kind, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def fits(value: object, kind: Kind, largest: float) -> bool:
    """Return True if a value is of a type.

    Args:
        value: the value.
        kind: the type. Of a literal, whose values are a rule of the configuration, any string is.
        largest: largest number of a float.
    """
    return any(_fits_one(value, option, largest) for option in options_of(kind))


def _fits_one(value: object, kind: Kind, largest: float) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        # Compared, not converted: an integer may be too large for a float.
        return isinstance(value, int | float) and abs(value) <= largest
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits_one(part, int, largest) for part in value)
    if origin is list:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return isinstance(value, kind)


def kind_name(kind: Kind, notation: Notation) -> str:
    """Return the name of a type, in the words of the language that its value is written in."""
    names = {
        float: "a finite number",
        int: "an integer",
        bool: notation.boolean,
        str: "a string",
        list[str]: "a list of strings",
        types.NoneType: notation.none,
    }

    def name_of(option: Kind) -> str:
        if typing.get_origin(option) is tuple:
            return f"a {notation.sequence} of integers"
        return names.get(option, getattr(option, "__name__", str(option)))

    return " or ".join(map(name_of, options_of(kind)))
