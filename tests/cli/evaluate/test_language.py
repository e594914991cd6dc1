import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.data import load_documents, load_tokenizer
from resolvent.evaluation import evaluate_documents
from resolvent.models import load_model
from resolvent.training.corpus import split_corpus
from resolvent.training.run_folder import read_run

Resolvent = Callable[..., Any]


def test_evaluate_as_json_has_the_four_keys(resolvent: Resolvent, run_dir: Path, text_file: Path):
    outcome = resolvent("evaluate", run_dir, "--data", text_file, "--json", "-")
    assert outcome.code == 0
    values = json.loads(outcome.out)
    assert list(values) == ["loss", "perplexity", "bits_per_byte", "tokens"]
    score = evaluate_documents(load_model(run_dir, "cpu"), load_documents(text_file), load_tokenizer(run_dir))
    assert values == pytest.approx(dataclasses.asdict(score))
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))


def test_held_out_reads_what_the_run_held_out(resolvent: Resolvent, run_dir: Path, text_file: Path):
    values = json.loads(resolvent("evaluate", run_dir, "--data", text_file, "--held-out", "--json", "-").out)
    held_out = split_corpus(read_run(run_dir)[0])[1]
    score = evaluate_documents(load_model(run_dir, "cpu"), held_out, load_tokenizer(run_dir))
    assert values == pytest.approx(dataclasses.asdict(score))
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_bits_per_byte"] == pytest.approx(values["bits_per_byte"])


def test_evaluate_as_a_table(resolvent: Resolvent, run_dir: Path, text_file: Path):
    values = json.loads(resolvent("evaluate", run_dir, "--data", text_file, "--json", "-").out)
    table = resolvent("evaluate", run_dir, "--data", text_file).out
    assert "bits per byte" in table
    assert f"{values['bits_per_byte']:.4f}" in table


def test_tasks_from_packages_are_scored(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    file = tmp_path / "HumanEval.jsonl.gz"
    row = {"prompt": "def one():\n", "canonical_solution": "    return 1\n"}
    file.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    task = ("--tasks", "human_eval", "--task-path", file)
    score = json.loads(resolvent("evaluate", run_dir, *task, "--json", "-").out)["human_eval"]
    assert score["examples"] == 1 and score["accuracy"] is None and score["nats_per_byte"]["mean"] > 0
    table = resolvent("evaluate", run_dir, *task).out
    assert "nats per byte" in table and f"{score['nats_per_byte']['mean']:.4f}" in table
    mixed = resolvent("evaluate", run_dir, "--tasks", "human_eval,hellaswag")
    assert mixed.code == 2 and "hellaswag: evaluate them in a call of their own" in " ".join(mixed.err.split())
