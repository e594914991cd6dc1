"""`resolvent tokenize`, and runs on what it makes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import words

Resolvent = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": f"Line {n} of a text, one of many.\n" * 3}) + "\n" for n in range(50)))
    return path


def test_a_run_learns_from_tokens_as_from_their_text(resolvent: Resolvent, text: Path, tmp_path: Path):
    out, options = tmp_path / "tokens", ["--tokenizer", "bpe", "--vocab-size", 300]
    made = resolvent("tokenize", "--data", text, "--text-field", "body", "--out", out, *options, "--json", "-")
    figures = json.loads(made.out)
    assert made.code == 0 and figures["validation_fraction"] == 0.1
    assert figures["streams"]["train"]["bytes"] + figures["streams"]["held-out"]["bytes"] == sum(
        len(json.loads(line)["body"]) for line in text.read_text().splitlines()
    )
    assert f"resolvent train --data {out} --tokenizer {out}" in made.err
    sizes = [part for size in ("d_model=16", "n_layers=1", "num_heads=2", "head_dim=8") for part in ("--set", size)]
    sizes += ["--steps", 2, "--seq-len", 16, "--batch-size", 2, "--device", "cpu"]
    scores = []
    for name, source in (("a", ["--data", out, "--tokenizer", out]), ("b", ["--data", text, "--text-field", "body"])):
        more = options if name == "b" else []
        outcome = resolvent("train", *source, *more, *sizes, "--out", tmp_path / name, "--json", "-")
        scores.append(json.loads(outcome.out)["validation"])
    assert scores[0] == scores[1]


def test_a_folder_in_use_is_an_error_of_usage(resolvent: Resolvent, text: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    outcome = resolvent("tokenize", "--data", text, "--text-field", "body", "--out", tmp_path / "mine")
    assert outcome.code == 2 and "choose another one with --out" in words(outcome.err)
    assert not any((tmp_path / "mine").iterdir())


def test_a_cache_that_cannot_be_written_is_an_error(resolvent: Resolvent, text: Path, tmp_path: Path):
    outcome = resolvent("train", "--data", text, "--text-field", "body", "--cache", text, "--out", tmp_path / "run")
    assert outcome.code == 1 and "cannot write to" in outcome.err and "--cache" in outcome.err
    assert not (tmp_path / "run").exists()
