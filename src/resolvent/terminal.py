"""Escaping of text for terminals and shells."""

import codecs
import io
import os
import shlex
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

DEGRADE = "resolvent.degrade"
"""Name of the error handler that writes ASCII for characters that an encoding lacks, such as +- for ±."""

_ASCII = {
    "±": "+-",
    "·": ".",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "Γ": "Gamma",
    "Δ": "Delta",
    "ε": "epsilon",
    "ζ": "zeta",
    "η": "eta",
    "κ": "kappa",
    "λ": "lambda",
}


def _degrade(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks by ASCII, or by escapes as in Python's strings."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character) or _escaped(character) for character in text), error.end


codecs.register_error(DEGRADE, _degrade)


def degrade_streams(*streams: TextIO | None) -> None:
    """Make streams replace characters that their encoding lacks, instead of raising an error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=DEGRADE)


def discard_output() -> None:
    """Discard further writes to standard output, whose reader has closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Return text with control characters escaped, except line feeds and tabs."""
    return "".join(_escaped(character) if _is_control(character) else character for character in text)


def for_terminal(text: str, stream: TextIO) -> str:
    """Return text for a stream: ``printable`` if the stream is a terminal, otherwise unchanged."""
    return printable(text) if stream.isatty() else text


def plain(text: str, encoding: str = "utf-8") -> str:
    """Return text for a terminal: ``printable``, in the characters of its encoding.

    Args:
        text: any text; names and paths may hold bytes that are no UTF-8.
        encoding: encoding of the terminal; characters that it lacks become ASCII, so that widths can be measured.
    """
    return printable(text).encode(encoding, DEGRADE).decode(encoding)


def say(console: "Console", text: str, style: str | None = None) -> None:
    """Print text on a console without markup, emoji codes and folding."""
    shown = plain(text, console.encoding)
    console.print(shown, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def shell_word(path: object) -> str:
    """Return a path of any characters as a word that can be pasted into a shell."""
    word = str(path)
    if word.startswith("-"):  # otherwise commands would read an option
        word = f"./{word}"
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_quoted, word)) + "'"


def _quoted(character: str) -> str:
    """Escape a character between $' and '."""
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _escaped(character: str) -> str:
    """Escape a character as Python's strings do; a byte that is no UTF-8 as that byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _is_control(character: str) -> bool:
    """Return True for a control character of terminals (C0, DEL, C1)."""
    return (character < " " and character not in "\n\t") or "\x7f" <= character <= "\x9f"
