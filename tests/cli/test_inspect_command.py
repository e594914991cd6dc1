import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.data import load_tokenizer
from resolvent.files import write_json
from resolvent.inspection import inspect_model
from resolvent.manifest import write_manifest
from resolvent.models import load_model, save_model
from resolvent.runs import RUN_FILE, fixed_files
from resolvent.training.corpus import load_corpus, split_corpus
from resolvent.training.run_folder import read_run

Resolvent = Callable[..., Any]
DEVICE = ("--device", "cpu")


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])["runs"][0]


def text_of(page: Path) -> str:
    return "".join(data_of(page)["tokens"][1:])


def test_help_teaches_by_an_example(resolvent: Resolvent):
    assert "Example: resolvent inspect runs/tiny" in resolvent("inspect", "--help").out


def test_a_run_on_the_default_corpus_reads_what_it_held_out(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    record, config = json.loads((run / RUN_FILE).read_text()), dataclasses.replace(read_run(run)[0], data=None)
    record["training"]["data"] = None
    record["data_fingerprint"] = load_corpus(config, load_tokenizer(run)).fingerprint
    write_json(run / RUN_FILE, record)
    write_manifest(run, fixed_files())
    outcome = resolvent("inspect", run, *DEVICE)
    page = run / "inspection.html"
    assert outcome.code == 0, outcome.err
    first, second = outcome.out.splitlines()
    assert first == "Reading   the held-out part of the default corpus"
    assert re.fullmatch(rf"{page}: \d+ tokens, 0\.\d MB; open it in a browser", second)
    found = data_of(page)
    assert split_corpus(read_run(run)[0])[1][0].startswith(text_of(page)[:200]) and found["name"] == str(run)
    assert len(found["curves"]["step"]) == 150 and found["curves"]["validation_step"] == [150]


def test_a_run_on_a_text_reads_what_it_held_out(resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path):
    for options in (["--data", text_file, "--held-out"], []):
        outcome = resolvent("inspect", run_dir, *options, "--out", tmp_path / "page.html", *DEVICE)
        assert outcome.code == 0, outcome.err
        assert text_of(tmp_path / "page.html") == split_corpus(read_run(run_dir)[0])[1][0]


def test_given_text(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    out = tmp_path / "page.html"
    arguments = ("--text", "The old cat.", "--out", out, "--length", 9, *DEVICE, "--json", "-")
    outcome = resolvent("inspect", run_dir, *arguments)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == data_of(out)
    model, tokenizer = load_model(run_dir, "cpu"), load_tokenizer(run_dir)
    expected = inspect_model(model, tokenizer, "The old cat.", length=9, metrics=run_dir / "metrics.jsonl")
    assert data_of(out) | {"name": "model"} == json.loads(json.dumps(expected.to_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_two_runs_are_shown_side_by_side(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    out = tmp_path / "page.html"
    other = next(iter(sorted((run_dir / "checkpoints").iterdir())))
    arguments = ("--text", "The old cat sat.", "--compare", other, "--out", out, *DEVICE, "--json", "-")
    outcome = resolvent("inspect", run_dir, *arguments)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [run["name"] for run in found["runs"]] == [str(run_dir), str(other)]
    assert found["comparison"]["words"] == ["The", " old", " cat", " sat."]
    assert found["runs"][0] == data_of(out)


def test_a_text_from_a_file(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    (tmp_path / "text").write_bytes("père ".encode() + b"\xff.")
    outcome = resolvent("inspect", run_dir, "--file", tmp_path / "text", "--out", tmp_path / "page.html", *DEVICE)
    assert outcome.code == 0, outcome.err
    assert text_of(tmp_path / "page.html") == "père \ufffd."


def test_a_model_without_a_run_needs_a_text(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    save_model(load_model(run_dir, "cpu"), tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((run_dir / "tokenizer.json").read_bytes())
    outcome = resolvent("inspect", tmp_path, *DEVICE)
    assert outcome.code == 1 and "name a text with --data" in outcome.err
    assert resolvent("inspect", tmp_path, "--text", "The old cat.", *DEVICE).code == 0
    assert data_of(tmp_path / "inspection.html")["curves"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--text", "a", "--file", "-"], 2, "leave out --text"),
        (["--text", "a", "--held-out"], 2, "leave out --data, --text-field and --held-out"),
        (["--out", "no/such/folder/page.html"], 2, "no/such/folder is no folder"),
        (["--length", 1], 2, "Invalid value for '--length'"),
        (["--text", ""], 1, "there is no text"),
    ],
)
def test_errors_name_the_remedy(resolvent: Resolvent, run_dir: Path, options: list[Any], code: int, message: str):
    outcome = resolvent("inspect", run_dir, *options, *DEVICE)
    assert outcome.code == code and message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", outcome.err).split())
    assert not (run_dir / "inspection.html").exists()
