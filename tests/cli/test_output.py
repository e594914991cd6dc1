"""Output of the commands: any name, any encoding, any width, for readers and for programs."""

import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from resolvent import benchmark, training
from resolvent.benchmark.harness import Bench, Measurement
from tests.cli.conftest import call, words

Resolvent = Callable[..., Any]

CPU = ("--device", "cpu")
MEASURES = {
    "language": (),
    "positions": ("--length", 40, "--sequences", 3),
    "needle": ("--length", 32, "--samples", 4, "--candidates", 5),
    "influence": ("--length", 40, "--sequences", 2),
}
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "format-5"
"""A run that loads quickly. In the tests its name holds what is an end tag and an emoji to Rich: [/y]:cat:"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with an odd name."""
    path = tmp_path_factory.mktemp("odd") / "c[" / "y]:cat:.txt"
    path.parent.mkdir()
    shutil.copy(GOLDEN / "verses.txt", path)
    return path


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an odd name."""
    return Path(shutil.copytree(GOLDEN / "run", tmp_path_factory.mktemp("odd") / "my c[" / "y]:cat:"))


@pytest.fixture(scope="module")
def phase1_run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A Phase 1 run with an odd name."""
    path = tmp_path_factory.mktemp("odd") / "my 1[" / "y]:cat:"
    sizes = ("d_model=16", "n_layers=1", "num_heads=2", "ar_ssm_max_rank=4", "htt_rank=4")
    options = [part for size in sizes for part in ("--set", size)]
    size = ("--steps", 1, "--seq-len", 64, "--batch-size", 2)
    assert call("train", "--phase", 1, "--data", text, "--out", path, *size, *options, *CPU) == 0
    return path


@pytest.fixture
def commands(
    odd_run: Path, phase1_run: Path, text: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[object, ...]]:
    """Every command that has figures, with arguments that make it quick."""

    def measure(bench: Bench) -> None:
        row = bench.measure("a [/y] :cat:", lambda check: 1234.5)
        bench.add("section", "a [/y] :cat:", "ms", row)

    monkeypatch.setattr(benchmark, "SECTIONS", {"section": lambda _: [Measurement("section", "a", measure)]})
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: benchmark.timing.Ceilings(1e9, 1e12))
    monkeypatch.setattr(benchmark.harness, "cpu_seconds_of_others", float)  # whatever else the machine computes
    measures = {
        f"evaluate {name}": ("evaluate", name, odd_run, "--data", text, *CPU, *options)
        for name, options in MEASURES.items()
    }
    return {
        **measures,
        "train": ("train", "--data", text, "--out", tmp_path / "my t[" / "y]:cat:", "--steps", 1, *small),
        "inspect": ("inspect", odd_run, "--text", "The old cat.", "--out", tmp_path / "page.html", *CPU),
        "convert": ("convert", phase1_run, tmp_path / "my v[" / "y]:cat:"),
        "presets": ("presets",),
        "benchmark": ("benchmark", "--quick", *CPU),
    }


NAMES = (*(f"evaluate {name}" for name in MEASURES), "train", "inspect", "convert", "presets", "benchmark")


class Stream(io.TextIOWrapper):
    """Standard output with an encoding of its own."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def read_back(self) -> str:
        self.flush()
        written = self.buffer.getvalue()
        return written.decode(self.encoding)


@pytest.mark.parametrize("name", NAMES)
def test_json_goes_to_a_file_or_to_standard_output(
    resolvent: Resolvent, commands: dict[str, tuple[object, ...]], tmp_path: Path, name: str
):
    alone = resolvent(*commands[name], "--json", "-")
    assert alone.code == 0, alone.err
    figures = json.loads(alone.out)
    for folder in ("my t[", "my v["):  # what the first call wrote
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    beside = resolvent(*commands[name], "--json", tmp_path / "found.json")
    assert beside.code == 0 and beside.out
    kinds = {key: type(value) for key, value in figures.items()}
    assert {key: type(value) for key, value in json.loads((tmp_path / "found.json").read_text()).items()} == kinds
    assert not set(beside.out.splitlines()) & set(alone.out.splitlines())
    if name not in ("train", "inspect", "benchmark"):  # whose progress is shown elsewhere
        assert not alone.err


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(resolvent: Resolvent, commands: dict[str, tuple[object, ...]], name: str):
    outcome = resolvent(*commands[name])
    assert outcome.code == 0, outcome.err
    if name in ("train", "convert"):
        assert "y]:cat:'" in outcome.out
    elif name == "benchmark":
        assert outcome.out.count("a [/y] :cat:") == 2
    elif name.startswith("evaluate"):
        assert f"{commands[name][2]}" in outcome.out
    assert "\x1b" not in outcome.out + outcome.err and "🐱" not in outcome.out + outcome.err
    assert not re.search("[━╸⠋]", outcome.out + outcome.err)  # neither bars nor spinners


@pytest.mark.parametrize("name", NAMES)
def test_figures_degrade_to_ascii(
    commands: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
):
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert call(*commands[name], "--json", tmp_path / "found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text())
    out = stream.read_back()
    assert out.isascii()
    if name in ("evaluate positions", "evaluate needle", "evaluate influence"):
        assert " +- " in out


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("train", "inspect")])
def test_a_width_of_20_cuts_no_figure(
    resolvent: Resolvent,
    commands: dict[str, tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = resolvent(*commands[name])
    monkeypatch.setenv("COLUMNS", "20")
    shutil.rmtree(tmp_path / "my v[", ignore_errors=True)
    narrow = resolvent(*commands[name])
    assert wide.code == narrow.code == 0
    assert "…" not in wide.out + narrow.out

    def figures(page: str) -> list[str]:
        return sorted(re.findall(r"[\d,]+\.\d+|\d[\d,]{3,}", page))

    if name != "benchmark":  # which takes its time
        assert figures(narrow.out) == figures(wide.out)
    else:
        assert "1,234" in narrow.out


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("evaluate")])
def test_results_are_written_before_they_are_shown(
    commands: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
):
    class Broken(Stream):
        def write(self, text: str) -> int:
            raise OSError("no terminal any more")

    monkeypatch.setattr(sys, "stdout", Broken("utf-8"))
    path = tmp_path / "found.json"
    assert call(*commands[name], "--json", path) == 1
    assert json.loads(path.read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("evaluate")])
def test_figures_are_shown_where_their_file_cannot_be_written(
    resolvent: Resolvent, commands: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, name: str
):
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    shown = resolvent(*commands[name]).out
    monkeypatch.setattr("resolvent.files.write_output", refuse)
    outcome = resolvent(*commands[name], "--json", "found.json")
    assert outcome == (1, shown, "Error: the disk is full\n")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), "needs a FILE, or - for standard output."),
        (("--device", "cpu"), "needs a FILE, or - for standard output; got --device."),
        (("/",), "needs a FILE, or - for standard output; got /."),
        (("nowhere/found.json",), "nowhere is no folder; make it first."),
    ],
)
def test_json_without_a_file_is_refused_with_the_remedy(
    resolvent: Resolvent, commands: dict[str, tuple[object, ...]], name: str, value: tuple[str, ...], message: str
):
    outcome = resolvent(*commands[name], "--json", *value)
    assert outcome.code == 2 and not outcome.out
    assert f"Invalid value for --json: {message}" in words(outcome.err)


def test_hints_are_quoted_for_the_shell(
    resolvent: Resolvent, commands: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
):
    run, converted = commands["train"][4], commands["convert"][2]

    def hint(told: str) -> list[str]:
        return shlex.split(told.splitlines()[-1].partition(": ")[2])

    assert hint(resolvent(*commands["train"]).out)[:3] == ["resolvent", "generate", str(run)]
    assert hint(resolvent(*commands["convert"]).out) == ["resolvent", "train", "--from", str(converted)]
    used = resolvent(*commands["train"]).err
    assert f"--resume {shlex.quote(str(run))}, replace" in used

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("resolvent.training.run.resume", stop)
    assert hint(resolvent("train", "--resume", run).out) == ["resolvent", "train", "--resume", str(run)]


def test_a_learning_rate_has_a_short_name(
    resolvent: Resolvent, commands: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
):
    seen: list[float | None] = []
    train = training.run.train
    monkeypatch.setattr(
        "resolvent.training.run.train", lambda config, **k: seen.append(config.learning_rate) or train(config, **k)
    )
    assert resolvent(*commands["train"], "--lr", 0.25).code == 0
    assert seen == [0.25]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("evaluate")] + ["inspect"])
def test_ctrl_c_prints_no_traceback(
    resolvent: Resolvent, commands: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, name: str
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("resolvent.data.load_tokenizer", interrupt)
    assert resolvent(*commands[name]) == (130, "", "")


def test_ctrl_c_before_a_command_prints_no_traceback(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("resolvent.cli.app.app", interrupt)
    assert resolvent("presets") == (130, "", "")


@pytest.mark.parametrize("arguments", [("--help",), ("presets",)])
def test_closed_pipe_prints_no_error(arguments: tuple[str, ...]):
    process = subprocess.Popen(
        [sys.executable, "-m", "resolvent", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_a_full_disk_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "resolvent", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .*No space left on device\n", done.stderr)


def test_training_saves_when_its_pipe_is_closed(text: Path, small: list[str], tmp_path: Path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "resolvent", "train", "--steps", "1000000", "--log-interval", "1"]
    process = subprocess.Popen(
        [*command, "--data", str(text), "--out", str(run), *small], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith(b"step "):
            assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert (run / "model.safetensors").exists() and len(list((run / "checkpoints").iterdir())) == 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Run a command in a terminal, and read what it was sent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: object) -> bytes:
        main, second = pty.openpty()
        with os.fdopen(second, "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            assert call(*arguments) == 0
            file.flush()
            os.set_blocking(main, False)
            seen = b""
            with suppress(BlockingIOError):
                while True:
                    seen += os.read(main, 1 << 16)
                    time.sleep(0.01)
        os.close(main)
        return seen

    return run


COLOUR = re.compile(rb"\x1b\[[\d;]*m")


@pytest.mark.parametrize("arguments", [("--help",), ("evaluate", "needle", "--help"), ("presets",)])
def test_no_color_leaves_no_colour(
    terminal: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
):
    from typer import rich_utils

    monkeypatch.setattr(rich_utils, "COLOR_SYSTEM", rich_utils.COLOR_SYSTEM)  # put back afterwards
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = terminal(*arguments)
    monkeypatch.setenv("NO_COLOR", "1")
    assert COLOUR.search(coloured) and not COLOUR.search(terminal(*arguments))
