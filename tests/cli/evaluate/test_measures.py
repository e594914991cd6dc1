import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.data import encode_documents, load_documents, load_tokenizer
from resolvent.evaluation import evaluate_needle, evaluate_positions, measure_influence
from resolvent.models import load_model

Resolvent = Callable[..., Any]

SMALL = {
    "positions": ["--length", 40, "--sequences", 3],
    "needle": ["--length", 32, "--samples", 4, "--candidates", 5],
    "influence": ["--length", 40, "--sequences", 2],
}


@pytest.mark.parametrize("measure", ["language", *SMALL])
def test_help_teaches_by_an_example(resolvent: Resolvent, measure: str):
    assert measure in resolvent("evaluate", "--help").out
    text = resolvent("evaluate", measure, "--help").out
    assert "Example: resolvent evaluate runs/tiny" in text or f"Example: resolvent evaluate {measure}" in text


@pytest.mark.parametrize("options", [["--json", "-"], []])
def test_without_a_measure_it_is_language(resolvent: Resolvent, run_dir: Path, text_file: Path, options: list[str]):
    options = [*options, "--data", str(text_file)]
    plain = resolvent("evaluate", *options, run_dir)
    assert plain.code == 0
    assert plain == resolvent("evaluate", "language", run_dir, *options)


@pytest.mark.parametrize("measure", SMALL)
def test_a_measure_prints_a_table_and_writes_what_the_library_finds(
    resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path, measure: str
):
    found, plot = tmp_path / "found.json", tmp_path / "plot.png"
    arguments = ["--data", text_file, "--device", "cpu", *SMALL[measure], "--json", found, "--plot", plot]
    outcome = resolvent("evaluate", measure, run_dir, *arguments)
    assert outcome.code == 0, outcome.err
    model, tokenizer = load_model(run_dir, "cpu"), load_tokenizer(run_dir)
    stream = encode_documents(load_documents(text_file), tokenizer)
    scores = {
        "positions": lambda: evaluate_positions(model, stream, tokenizer, length=40, sequences=3),
        "needle": lambda: evaluate_needle(model, stream, tokenizer, length=32, samples=4, candidates=5),
        "influence": lambda: measure_influence(model, stream, length=40, sequences=2),
    }[measure]()
    written = json.loads(found.read_text())
    settings = written.pop("settings")
    assert written == json.loads(json.dumps(scores.to_dict()))
    assert (settings["model"], settings["data"], settings["length"]) == (
        str(run_dir),
        str(text_file),
        SMALL[measure][1],
    )
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"{run_dir}, ")
    assert len(lines) == 2 + len(scores.rows) + (measure == "needle")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_misspelt_measure_is_named(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("evaluate", "postions", run_dir)
    assert outcome.code == 2
    told = " ".join(outcome.err.replace("│", "").split())
    assert "'postions' is none of language, positions, needle, influence" in told


def test_new_path_of_held_out_text_is_accepted(resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path):
    moved = Path(shutil.copy(text_file, tmp_path / "moved.txt"))
    where = [["--data", path, "--held-out"] for path in (text_file, moved)]
    outcomes = [resolvent("evaluate", run_dir, *options, "--json", "-") for options in where]
    assert outcomes[0].code == 0 and outcomes[0] == outcomes[1]
    assert f"on held-out documents of {moved}" in resolvent("evaluate", run_dir, *where[1]).out


@pytest.mark.parametrize("measure", [[], ["positions", "--length", 40, "--sequences", 1]])
@pytest.mark.parametrize("held_out", [[], ["--held-out"]])
def test_without_data_the_text_of_the_run_is_read(
    resolvent: Resolvent, run_dir: Path, text_file: Path, measure: list[str], held_out: list[str]
):
    named = resolvent("evaluate", *measure, run_dir, "--data", text_file, "--held-out").out
    outcome = resolvent("evaluate", *measure, run_dir, *held_out)
    assert outcome.code == 0, outcome.err
    first, *rest = outcome.out.splitlines()
    assert first == f"Reading   the held-out part of {text_file}"
    assert rest[1:] == named.splitlines()[1:]


@pytest.mark.parametrize("change", ["moved", "changed"])
def test_text_of_the_run_that_is_gone_or_changed_is_an_error_with_the_remedy(
    resolvent: Resolvent, small: list[str], text_file: Path, tmp_path: Path, change: str
):
    text, run = Path(shutil.copy(text_file, tmp_path / "text.txt")), tmp_path / "run"
    assert resolvent("train", "--data", text, "--out", run, "--steps", 1, *small).code == 0
    if change == "moved":
        text.rename(tmp_path / "moved.txt")
    else:
        text.write_text(text.read_text().replace("old", "new"))
    outcome = resolvent("evaluate", run)
    assert outcome.code == 1
    cause, remedy = {
        "moved": (f"cannot read {text}: ", "; if the text was moved, name its new path: --data PATH --held-out\n"),
        "changed": (f"{text} has changed since the run {run} began", "read it as it is now: --data PATH --held-out\n"),
    }[change]
    assert cause in outcome.err and outcome.err.endswith(remedy)
    place = tmp_path / "moved.txt" if change == "moved" else text
    assert resolvent("evaluate", run, "--data", place, "--held-out").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--length", "100000"], 1, ": give more text or a shorter length"),
        (["--plot", "plot.gif"], 2, "plot.gif must end in .png, .pdf or .svg"),
        (["--plot", "nowhere/plot.png"], 2, "nowhere is no folder"),
        (["--json", "nowhere/found.json"], 2, "nowhere is no folder"),
        (["--length", "0"], 2, "--length"),
    ],
)
@pytest.mark.parametrize("measure", ["needle", "influence"])
def test_errors_name_the_remedy(
    resolvent: Resolvent, run_dir: Path, text_file: Path, measure: str, arguments: list[str], code: int, message: str
):
    outcome = resolvent("evaluate", measure, run_dir, "--data", text_file, *arguments)
    assert outcome.code == code
    assert message in " ".join(outcome.err.replace("│", "").split())
    assert not outcome.out


def test_a_missing_extra_is_named_before_anything_is_read(
    resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = resolvent("evaluate", "positions", tmp_path / "missing", "--plot", tmp_path / "plot.png")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "pip install 'resolvent[plots]'" in outcome.err
