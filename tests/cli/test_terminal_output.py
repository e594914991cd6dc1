"""Names, prompts and texts that a terminal would obey are shown as escapes, and go as they are into a pipe."""

import logging
import sys
from pathlib import Path

import pytest

from tests.test_terminal import NAME, SHOWN, Streams, streams

from .conftest import call

__all__ = ["streams"]


def test_generated_text_is_escaped_on_a_terminal(streams: Streams, run_dir: Path, tmp_path: Path):
    out, _ = streams()
    (tmp_path / "prompt").write_bytes(f"{NAME}\t\n".encode())
    options = ["--max-new-tokens", 100, "--temperature", 100.0, "--seed", 2]  # some of which are control characters
    assert call("generate", run_dir, "--prompt-file", tmp_path / "prompt", *options) == 0
    assert out.written.startswith(f"{SHOWN if out.isatty() else NAME}\t\n")
    controls = [letter for letter in out.written if letter < " " and letter not in "\n\t"]
    assert not controls if out.isatty() else len(controls) > 3


def test_names_in_errors_are_escaped(streams: Streams, tmp_path: Path):
    _, err = streams()
    assert call("generate", tmp_path / NAME) == 1
    assert (SHOWN if err.isatty() else NAME) in err.written
    assert ("\x1b" in err.written) is not err.isatty()


def test_names_in_usage_errors_are_escaped(streams: Streams, tmp_path: Path):
    _, err = streams()
    assert call("inspect", tmp_path, "--out", f"{NAME}/page.html") == 2
    assert "is no folder" in err.written and (SHOWN in err.written or not err.isatty())
    assert ("\x1b" in err.written) is not err.isatty()


def test_names_in_warnings_are_escaped(streams: Streams, run_dir: Path, tmp_path: Path):
    _, err = streams()
    (tmp_path / f"{NAME}.txt").write_bytes(b"text \xff" * 40)
    root, kept = logging.getLogger(), logging.getLogger().handlers
    root.handlers = []  # those of pytest
    try:
        assert call("evaluate", run_dir, "--data", tmp_path / f"{NAME}.txt") == 0
    finally:
        root.handlers = kept
    assert "Replaced 40 invalid sequences" in err.written
    assert (SHOWN if err.isatty() else NAME) in err.written
    assert ("\x1b" in err.written) is not err.isatty()


def test_names_in_tracebacks_are_escaped(streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, err = streams()
    monkeypatch.setenv("RESOLVENT_DEBUG", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(Exception, match="run") as raised:
        call("generate", tmp_path / NAME)
    sys.excepthook(raised.type, raised.value, raised.tb)
    assert "Traceback" in err.written
    assert ("\x1b" in err.written) is not err.isatty()
