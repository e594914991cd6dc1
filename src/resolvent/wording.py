"""Numbers and values in messages: `1 step`, `2,000 steps`, `67% of the text`, `null`."""

import json
from collections.abc import Callable
from typing import NamedTuple

from resolvent.files import shown, truncated


class Notation(NamedTuple):
    """Words of the language that a value is written in, for messages about that value.

    Attributes:
        none: the word for no value.
        boolean: the words for the two truth values.
        sequence: the noun for several values.
        show: returns a value as the language writes it, truncated after 200 characters.
    """

    none: str
    boolean: str
    sequence: str
    show: Callable[[object], str]


def _as_json(value: object) -> str:
    """Return a value as JSON; where JSON does not know its type, its repr."""
    try:
        return truncated(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError):
        return shown(value)


PYTHON = Notation("None", "True or False", "tuple", shown)
JSON = Notation("null", "true or false", "list", _as_json)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, whose plural ends in s unless it is given.

    >>> counted(1, "step"), counted(2000, "step"), counted(2, "process", "processes")
    ('1 step', '2,000 steps', '2 processes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def readings(passes: float, text: str = "the text") -> str:
    """Return how much of a text is read in a number of passes.

    >>> readings(0.667), readings(1.0), readings(3.24)
    ('67% of the text', 'the text once', 'the text 3.2 times')
    """
    if passes < 0.995:
        return f"{passes:.2g} of {text}" if passes < 0.005 else f"{passes:.0%} of {text}"
    return f"{text} once" if passes < 1.05 else f"{text} {passes:.{1 if passes < 9.95 else 0}f} times"
