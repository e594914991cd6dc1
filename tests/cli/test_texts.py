"""Options of commands for texts, and errors for unreadable texts."""

import bz2
import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.data import load_documents, load_tokenizer
from resolvent.evaluation import evaluate_documents
from resolvent.memory import Memory
from resolvent.models import load_model
from resolvent.training.corpus import split_corpus
from resolvent.training.run_folder import read_run
from tests.cli.conftest import Outcome
from tests.cli.test_inspect_command import text_of

Resolvent = Callable[..., Outcome]
PANICS = "a" * 40 + "c"


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Two texts, a document each, the second in a field of its own."""
    first, second = tmp_path / "first.txt", tmp_path / "second.jsonl"
    first.write_text("The old cat sat on the big mat.\n" * 20)
    second.write_text("".join(json.dumps({"body": f"The shy cat {n} sat on the wet mat.\n"}) + "\n" for n in range(20)))
    return first, second


def words_of(outcome: Outcome) -> str:
    """An error as one line, without the frame around wrong usage."""
    return " ".join(outcome.err.replace("│", "").split())


def test_train_reads_every_text_that_is_named(
    resolvent: Resolvent, texts: tuple[Path, Path], small: list[str], tmp_path: Path
):
    run = tmp_path / "run"
    named = ["--data", texts[0], "--data", texts[1], "--text-field", "body"]
    outcome = resolvent("train", *named, "--validation-data", texts[0], "--out", run, "--steps", 2, *small)
    assert outcome.code == 0, outcome.err
    assert "in 21 documents to learn from" in outcome.out
    config, _ = read_run(run)
    assert (config.data, config.validation_data) == ([str(path) for path in texts], str(texts[0]))
    assert resolvent("train", "--resume", run).code == 0
    assert resolvent("train", "--resume", run, "--data", texts[0], "--data", texts[1]).code == 0
    outcome = resolvent("train", "--resume", run, "--text-field", "text")
    assert outcome.code == 2 and "leave out --text-field" in words_of(outcome)


def test_train_shows_the_shares_of_a_mixture(
    resolvent: Resolvent, texts: tuple[Path, Path], small: list[str], tmp_path: Path
):
    other = tmp_path / "other.txt"
    other.write_text("The shy cat sat on the wet mat.\n" * 20)
    mixed = ["--data", f"{texts[0]}:1", "--data", f"{other}:3"]
    outcome = resolvent("train", *mixed, "--out", tmp_path / "run", "--steps", 1, *small)
    assert f"Windows   25% from {texts[0]}, 75% from {other}\n" in outcome.out


def test_held_out_part_of_several_texts_has_the_field_of_the_run(
    resolvent: Resolvent, texts: tuple[Path, Path], small: list[str], tmp_path: Path
):
    run = tmp_path / "run"
    named = ["--data", texts[0], "--data", texts[1]]
    assert resolvent("train", *named, "--text-field", "body", "--out", run, "--steps", 2, *small).code == 0
    held_out = split_corpus(read_run(run)[0])[1]
    score = evaluate_documents(load_model(run, "cpu"), held_out, load_tokenizer(run))
    for options in ([*named, "--held-out"], []):
        outcome = resolvent("evaluate", run, *options)
        assert outcome.code == 0, outcome.err
        assert f"{score.bits_per_byte:.4f}" in outcome.out
    assert resolvent("inspect", run, *named, "--held-out", "--out", tmp_path / "page.html").code == 0


def test_inspect_reads_the_field_that_is_named(
    resolvent: Resolvent, run_dir: Path, texts: tuple[Path, Path], tmp_path: Path
):
    page = tmp_path / "page.html"
    outcome = resolvent("inspect", run_dir, "--data", texts[1], "--text-field", "body", "--out", page)
    assert outcome.code == 0, outcome.err
    assert "35 tokens" in outcome.out
    outcome = resolvent("inspect", run_dir, "--text", "A cat", "--text-field", "body", "--out", page)
    assert outcome.code == 2


def test_evaluate_reads_every_text_that_is_named(resolvent: Resolvent, run_dir: Path, texts: tuple[Path, Path]):
    documents = [*load_documents(texts[0]), *load_documents(texts[1], text_field="body")]
    score = evaluate_documents(load_model(run_dir, "cpu"), documents, load_tokenizer(run_dir))
    outcome = resolvent("evaluate", run_dir, "--data", texts[0], "--data", texts[1], "--text-field", "body")
    assert outcome.code == 0, outcome.err
    assert f"{score.bits_per_byte:.4f}" in outcome.out and f"{score.tokens:,}" in outcome.out


@pytest.mark.parametrize("measure", ["language", "positions"])
def test_field_without_a_text_is_refused(resolvent: Resolvent, run_dir: Path, measure: str):
    outcome = resolvent("evaluate", measure, run_dir, "--text-field", "body")
    assert outcome.code == 1
    assert outcome.err == "Error: --text-field selects a field of a text: name the text with --data\n"


def test_positions_read_every_text_that_is_named(
    resolvent: Resolvent, run_dir: Path, texts: tuple[Path, Path], tmp_path: Path
):
    named = ["--data", texts[0], "--data", texts[1], "--text-field", "body", "--json", tmp_path / "p.json"]
    assert resolvent("evaluate", "positions", run_dir, "--length", 32, *named).code == 0
    assert json.loads((tmp_path / "p.json").read_text())["settings"]["data"] == [str(path) for path in texts]


def test_project_with_a_run_inside_trains_resumes_and_evaluates(
    resolvent: Resolvent,
    text_file: Path,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    shutil.copy(text_file, tmp_path / "rhymes.txt")
    monkeypatch.chdir(tmp_path)
    assert resolvent("train", "--data", ".", "--out", "runs/x", "--steps", 2, *small).code == 0
    assert resolvent("train", "--resume", "runs/x").code == 0
    outcome = resolvent("evaluate", "runs/x", "--data", ".")
    assert outcome.code == 0, outcome.err
    assert "Left out of ., as not text: 1 x the folder of a run, as runs/x" in caplog.text


def make_bomb(path: Path) -> None:
    shutil.copy("/dev/null", path)
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a named pipe, not text: write its text into a file, and name that"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not text"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(30)), "is a ZIP archive, not text: unpack it"),
        (lambda path: path.write_bytes(b"%PDF-1.7"), "is a PDF document, not text: extract its text first"),
        (make_bomb, "is binary data (it holds NUL bytes), not text"),
        (lambda path: path.mkdir(), "holds no text; give a file or a folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_file_that_is_not_text_is_a_one_line_error(
    resolvent: Resolvent, run_dir: Path, tmp_path: Path, command: str, make: Callable[[Path], Any], message: str
):
    make(tmp_path / "x")
    arguments = ["--out", tmp_path / "run"] if command == "train" else [run_dir]
    outcome = resolvent(command, *arguments, "--data", tmp_path / "x")
    assert outcome.code == 1
    name = (tmp_path / "x").resolve() if command == "train" else tmp_path / "x"  # which keeps where a link leads
    assert outcome.err.startswith(f"Error: {name} {message}") and outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["", "runs"])
def test_path_that_is_empty_is_not_the_working_directory(
    resolvent: Resolvent, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
):
    """As a variable of the shell is that has no value."""
    monkeypatch.chdir(tmp_path)
    outcome = resolvent("train", "--data", value, "--out", tmp_path / "run")
    assert outcome.code != 0 and not (tmp_path / "run").exists()
    outcome = resolvent("evaluate", run_dir, "--data", value)
    assert outcome.code == 1
    assert outcome.err.startswith("Error: a text needs a path" if value == "" else "Error: cannot read runs: ")


def test_panic_of_a_library_is_one_error(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    """Behind what the library itself writes."""
    shutil.copytree(run_dir, tmp_path / "run")
    for name in ("manifest.json", "training.json"):
        (tmp_path / "run" / name).unlink()
    tokenizer = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    pattern = {"Regex": "(a+)+$"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = resolvent("generate", tmp_path / "run", "--prompt", PANICS)
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last == (
        "Error: the tokenizers library failed (Onig: Regex search error: retry-limit-in-match over): use another "
        "tokenizer"
    )
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "pack",
    [
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(text.encode()),
        lambda text: text.encode("utf-8-sig"),
    ],
)
def test_prompt_file_is_recognised_by_its_content(
    resolvent: Resolvent, run_dir: Path, tmp_path: Path, pack: Callable[[str], bytes]
):
    path, text, nothing = tmp_path / "prompt", "Rhyme: the örl ", ["--max-new-tokens", 0, "--device", "cpu"]
    path.write_bytes(pack(text))
    assert resolvent("generate", run_dir, "--prompt-file", path, *nothing) == (0, f"{text}\n", "")
    page = tmp_path / "page.html"
    assert resolvent("inspect", run_dir, "--file", path, "--out", page, "--device", "cpu").code == 0
    assert text_of(page) == text


def test_prompt_from_a_pipe_is_recognised_by_its_content(run_dir: Path):
    code = "from resolvent.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", str(run_dir), "--prompt-file", "-", "--max-new-tokens", "0"]
    finished = subprocess.run(command, input=bz2.compress(b"Rhyme"), capture_output=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (0, b"Rhyme\n"), finished.stderr


@pytest.mark.parametrize("command", [("generate", "--prompt-file"), ("inspect", "--file")])
def test_prompt_file_that_is_no_text_is_refused(
    resolvent: Resolvent, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
):
    name, option = command
    with zipfile.ZipFile(tmp_path / "prompt", "w") as archive:
        archive.writestr("a.txt", "text")
    outcome = resolvent(name, run_dir, option, tmp_path / "prompt", "--device", "cpu")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"{tmp_path / 'prompt'} is a ZIP archive, not text: unpack it" in outcome.err
    monkeypatch.setattr("resolvent.data.reading.machine_memory", lambda: Memory(1 << 20, 1 << 20))
    outcome = resolvent(name, run_dir, option, "/dev/zero", "--device", "cpu")
    assert outcome.code == 1
    assert "/dev/zero: the text takes more than 262,144 bytes of memory" in outcome.err
