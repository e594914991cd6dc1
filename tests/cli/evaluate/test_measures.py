import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from resolvent.cli.evaluate.positions import show
from resolvent.data import encode_documents, load_documents, load_tokenizer
from resolvent.evaluation import evaluate_mechanisms, evaluate_needle, evaluate_positions, measure_influence
from resolvent.models import load_model

Resolvent = Callable[..., Any]

SMALL = {
    "positions": ["--length", 40, "--sequences", 3],
    "needle": ["--length", 32, "--samples", 4, "--candidates", 5],
    "influence": ["--length", 40, "--sequences", 2],
}


@pytest.mark.parametrize("measure", ["language", *SMALL, "mechanisms"])
def test_help_teaches_by_an_example(resolvent: Resolvent, measure: str):
    assert measure in resolvent("evaluate", "--help").out
    text = resolvent("evaluate", measure, "--help").out
    assert "Example: resolvent evaluate runs/tiny" in text or f"Example: resolvent evaluate {measure}" in text


@pytest.mark.parametrize("options", [["--json"], []])
def test_without_a_measure_it_is_language(resolvent: Resolvent, run_dir: Path, options: list[str]):
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


def test_mechanisms_prints_its_tables_and_writes_what_the_library_finds(
    resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path
):
    path = tmp_path / "found.json"
    arguments = ["--data", text_file, "--device", "cpu", "--length", 64, "--horizon", 32, "--joined", "--json", path]
    outcome = resolvent("evaluate", "mechanisms", run_dir, *arguments)
    assert outcome.code == 0, outcome.err
    stream = encode_documents(load_documents(text_file), load_tokenizer(run_dir))
    options = dict(length=64, horizon=32, joined=True)
    found = evaluate_mechanisms(load_model(run_dir, "cpu"), stream, load_tokenizer(run_dir), **options)
    written = json.loads(path.read_text())
    settings = written.pop("settings")
    assert written == json.loads(json.dumps(found.to_dict()))
    assert settings == options | {"sequences": 16, "seed": 0, "model": str(run_dir), "data": str(text_file)}
    header, *parts = outcome.out.strip().split("\n\n")
    assert header.startswith(f"{run_dir}, {found.sequences} texts: 64 tokens read, the next 32 predicted at ")
    assert found.token_decay and found.half_lives
    rows = [len(found.heads), len(found.half_lives.rows), len(found.token_decay.rows), 5, 10]
    assert [len(part.splitlines()) for part in parts] == [3 + count for count in rows]  # title, headings, and in words
    assert f"Erasing all memories costs {found.erased.mean:+.4f} ± {found.erased.standard_error:.4f} nats" in parts[0]
    most = max(found.heads, key=lambda head: head.cost.mean)
    assert f"head {most.head} of layer {most.layer} is missed most, by {most.cost.mean:+.4f}" in parts[0]


def test_mechanisms_says_what_a_model_has_not(resolvent: Resolvent, tmp_path: Path, text_file: Path, small: list[str]):
    lacking = ("snr_enabled=false", "resonance_enabled=false", "adaptive_decay=false", "n_layers=1", "num_heads=1")
    options = [part for field in lacking for part in ("--set", field)]
    train = ["train", "--data", text_file, "--steps", 1]
    assert resolvent(*train, *small, *options, "--out", tmp_path / "plain").code == 0
    arguments = ["--data", text_file, "--length", 64, "--joined", "--device", "cpu"]
    outcome = resolvent("evaluate", "mechanisms", tmp_path / "plain", *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().split("\n\n")[2:] == [
        "The model has a single head: none is slow or fast.",
        "Γ is the same for all tokens (adaptive_decay=False).",
        "The model has no SNR filter (snr_enabled=False).",
        "The model has no resonance (resonance_enabled=False).",
    ]
    sizes = ["--set", "d_model=32", "--set", "n_layers=1", "--seq-len", 64, "--batch-size", 2, "--device", "cpu"]
    assert resolvent(*train, "--phase", 1, *sizes, "--out", tmp_path / "phase1").code == 0
    outcome = resolvent("evaluate", "mechanisms", tmp_path / "phase1", *arguments)
    assert outcome.code == 1
    assert "Phase1IntegratedModel, which has neither Γ nor a memory" in outcome.err
    assert not outcome.out


def test_tables_hold_the_figures(resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path):
    found = tmp_path / "found.json"
    out = resolvent("evaluate", "positions", run_dir, "--data", text_file, "--length", 8, "--json", found).out
    row = json.loads(found.read_text())["rows"][-1]
    line = out.splitlines()[-1]
    assert line.split()[:5] == ["5", "-", "8", str(row["sequences"]), str(row["tokens"])]
    for figure in (row["loss"]["mean"], row["bits_per_byte"], row["windows_loss"]["standard_error"]):
        assert f"{figure:.4f}" in line


def test_a_narrow_terminal_cuts_no_figure_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resolvent.cli.evaluate.positions.table_console", lambda: Console(width=80))
    headings = ("tokens read", "texts", "predicted", "loss", "perplexity", "bits per byte", "in windows", "gain")
    counts, estimates = ("1 - 2", "4,512", "65,536"), ("7.5678 ± 0.5678", "+8.9012 ± 0.9012")
    figures = (*counts, "1.2345 ± 0.1234", "1,227.035", "1.1234", *estimates)
    show("positions", headings, [figures])
    out = capsys.readouterr().out
    assert "1 - 2 " in out and set(" ".join([*headings, *figures]).split()) <= set(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_a_misspelt_measure_is_named(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("evaluate", "postions", run_dir)
    assert outcome.code == 2
    told = " ".join(outcome.err.replace("│", "").split())
    assert "'postions' is none of language, positions, needle, influence, mechanisms" in told


def test_a_text_that_has_moved_can_be_named(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    shutil.copy(text_file, text)
    assert resolvent("train", "--data", text, "--out", run, "--steps", 1, *small).code == 0
    text.unlink()
    outcome = resolvent("evaluate", run)
    assert outcome.code == 1
    assert str(text) in outcome.err and outcome.err.endswith("or name another text with --data\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--length", "100000"], 1, "in a row are needed: give more text or a lesser length"),
        (["--plot", "plot.gif"], 1, "plot.gif must end in .png, .pdf or .svg"),
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
