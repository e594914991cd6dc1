"""Text for terminals and shells: any name can be shown on any terminal, and pasted into a shell."""

import codecs
import io
import os
import shlex
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

DEGRADE = "resolvent.degrade"
"""Name of the error handler that writes ASCII in the place of what an encoding lacks: +- for ±."""

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
    """Let streams degrade characters that their encoding lacks instead of raising an error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=DEGRADE)


def discard_output() -> None:
    """Throw away what is still written to standard output, of which the reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Return text that no terminal obeys: control characters are escaped, but for the ends of lines and tabs."""
    return "".join(_escaped(character) if _is_control(character) else character for character in text)


def for_terminal(text: str, stream: TextIO) -> str:
    """Return text to be written to a stream: ``printable`` if that is a terminal, and as it is if not."""
    return printable(text) if stream.isatty() else text


def plain(text: str, encoding: str = "utf-8") -> str:
    """Return text that a terminal shows as it is: ``printable``, in the characters of its encoding.

    Args:
        text: any text; names and paths may hold bytes that are no UTF-8.
        encoding: the terminal's; characters that it lacks become ASCII, so that widths can be measured.
    """
    return printable(text).encode(encoding, DEGRADE).decode(encoding)


def say(console: "Console", text: str, style: str | None = None) -> None:
    """Print text on a console as it is: no markup, no emoji codes, no line breaks of the console's own."""
    shown = plain(text, console.encoding)
    console.print(shown, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def shell_word(path: object) -> str:
    """Return a path as a word that can be pasted into a shell, whatever characters it holds."""
    word = str(path)
    if word.startswith("-"):  # which commands take for an option
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
    """Escape a character as Python's strings do; a byte of a name that is no UTF-8 as that byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _is_control(character: str) -> bool:
    """Tell whether a terminal may obey a character (C0, DEL, C1) instead of showing it."""
    return (character < " " and character not in "\n\t") or "\x7f" <= character <= "\x9f"
