import io
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from resolvent.terminal import degrade_streams, for_terminal, plain, printable, say, shell_word

CLIPBOARD = "\x1b]52;c;aGFja2Vk\x07"
"""Lets many terminals put a text into the clipboard."""
NAME = f"run{CLIPBOARD}\x9b31m"
SHOWN = r"run\x1b]52;c;aGFja2Vk\x07\x9b31m"


class Terminal(io.TextIOWrapper):
    """A stream into memory that says to be a terminal."""

    def __init__(self, is_terminal: bool = True):
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def written(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


Streams = Callable[[], tuple[Terminal, Terminal]]
"""Takes the place of standard output and standard error."""


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Streams:
    def connect() -> tuple[Terminal, Terminal]:  # in the test: pytest connects its own before
        out, err = Terminal(request.param), Terminal(request.param)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("COLUMNS", "400")
        return out, err

    return connect


UGLY = [
    "runs/my run",
    "it's",
    "a\\b",
    "$HOME",
    "-x",
    "*",
    "c[/y]",
    ":cat:",
    "new\nline",
    "tab\t'",
    "\x1b]52;c;x\x07",
    "日本",
]


def test_shell_words_round_trip_through_a_shell():
    words = [*UGLY, os.fsdecode(b"r\xff'\xc3\xa9\\"), "\u202eevil"]
    script = f"printf '%s\\0' {' '.join(map(shell_word, words))}"
    read = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    expected = [f"./{word}" if word.startswith("-") else word for word in words]
    assert [os.fsdecode(word) for word in read.split(b"\0")[:-1]] == expected


def test_shell_words_hold_no_control_character():
    for word in map(shell_word, UGLY):
        assert word.isprintable()


@pytest.mark.parametrize("path", ["runs/first", Path("runs/first"), "a-b_c.d"])
def test_plain_paths_stay_as_they_are(path: object):
    assert shell_word(path) == str(path)


@given(
    st.text(alphabet=st.characters(exclude_categories=[]), max_size=40), st.sampled_from(["ascii", "latin-1", "utf-8"])
)
def test_plain_text_is_encodable_and_without_control_characters(text: str, encoding: str):
    shown = plain(text, encoding)
    assert shown.encode(encoding).decode(encoding) == shown
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert plain(shown, encoding) == shown


def test_characters_that_an_encoding_lacks_become_ascii():
    assert plain("1.2 ± 0.3 · Γ dt", "ascii") == "1.2 +- 0.3 . Gamma dt"
    assert plain("1.2 ± 0.3 · Γ dt", "latin-1") == "1.2 ± 0.3 · Gamma dt"
    assert plain("日本", "ascii") == r"\u65e5\u672c"
    assert plain("日本 Γ") == "日本 Γ"
    assert plain(os.fsdecode(b"r\xff")) == r"r\xff"


def test_a_stream_takes_any_text_and_other_streams_are_left_alone():
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    degrade_streams(stream, None, io.StringIO())
    print("± 日 \udcff", file=stream, flush=True)
    assert written.getvalue() == rb"+- \u65e5 \xff" + os.linesep.encode()


def test_line_is_printed_without_markup():
    console = Console(file=io.StringIO(), width=20)
    text = "[bold]:cat: [/y] 'runs' 1.5 " + "word " * 10 + "\x1b]52;c;x\x07"
    say(console, text)
    assert console.file.getvalue() == text[:-9] + r"\x1b]52;c;x\x07" + "\n"


def test_printable_keeps_newlines_and_tabs():
    text = "".join(map(chr, range(0x20))) + "\x7f\x80\x9f\xa0é日🙂\\x1b"
    shown = printable(text)
    assert shown.startswith(r"\x00\x01") and r"\x08" + "\t\n" + r"\x0b\x0c\r\x0e" in shown
    assert shown.endswith("\\x1f\\x7f\\x80\\x9f\xa0é日🙂\\x1b")


@given(st.text())
def test_printable_leaves_no_control_characters(text: str):
    shown = printable(text)
    assert all(letter in "\n\t" or not (letter < " " or "\x7f" <= letter <= "\x9f") for letter in shown)
    assert printable(shown) == shown
    assert for_terminal(text, Terminal(False)) == text
    assert for_terminal(text, Terminal()) == shown
