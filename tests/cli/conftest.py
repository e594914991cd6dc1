"""The command line as a function, and a run trained through it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from resolvent.cli import main

WORDS = [(cat, mat) for cat in ("old", "red", "shy") for mat in ("big", "wet")]


class Outcome(NamedTuple):
    """Outcome of a command."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> int:
    """Run the command as a shell would, but for the process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["resolvent", *map(str, arguments)])
        patch.setenv("GOMP_SPINCOUNT", "10000")  # the command sets it; only this test may see it
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def words(told: str) -> str:
    """The text of help or of a usage error without its frame and its line breaks."""
    return " ".join(told.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())


@pytest.fixture
def resolvent(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command and read what it printed."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        return Outcome(call(*arguments), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options that make a model small and quick to train."""
    sizes = ("d_model=32", "n_layers=2", "num_heads=2", "head_dim=16", "consolidation_interval=64")
    options = [part for size in sizes for part in ("--set", size)]
    return [*options, "--seq-len", "65", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rhymes.txt"
    path.write_text("<|endoftext|>\n".join(f"Rhyme: the {cat} cat sat on the {mat} mat.\n" for cat, mat in WORDS))
    return path


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, text_file: Path, small: list[str]) -> Path:
    path = tmp_path_factory.mktemp("runs") / "rhymes"
    size = ["--steps", 150, "--learning-rate", "1e-2", *small]
    assert call("train", "--data", text_file, "--out", path, *size) == 0
    return path
