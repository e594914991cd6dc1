"""Runs described by a file, and looked at before they are trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from resolvent.training.config_file import load_config
from resolvent.training.run_folder import read_run

from .conftest import words

Resolvent = Callable[..., Any]


def dumped(resolvent: Resolvent, *arguments: object) -> dict[str, Any]:
    """Return the output of --dump-config."""
    outcome = resolvent("train", *arguments, "--dump-config")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_command_line_wins_over_the_file(resolvent: Resolvent, tmp_path: Path):
    path = written(tmp_path, "steps: 5\nbatch-size: 3\ndata: [a.txt, b.txt]\nset: {n_layers: 3, d_model: 64}\n")
    values = dumped(resolvent, "--config", path, "--steps", 7, "--set", "n_layers=2")
    assert (values["steps"], values["batch_size"], values["data"]) == (7, 3, ["a.txt", "b.txt"])
    assert (values["preset"], values["set"]) == ("tiny", {"n_layers": 2, "d_model": 64})
    assert dumped(resolvent, "--config", path, "--data", "c.txt")["data"] == "c.txt"


def test_dumped_file_describes_the_same_run(resolvent: Resolvent, tmp_path: Path, small: list[str]):
    first = dumped(resolvent, "--tokenizer", "bpe", "--vocab-size", 300, "--schedule", "wsd", *small)
    assert dumped(resolvent, "--config", written(tmp_path, yaml.safe_dump(first))) == first


def test_file_with_a_single_text_trains(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    path = written(
        tmp_path, f"data: {text_file}\nout: {tmp_path / 'run'}\nsteps: 2\nlog_interval: 1\nvocab_size: 8192\n"
    )
    outcome = resolvent("train", "--config", path, *small)
    assert outcome.code == 0, outcome.err
    config, _ = read_run(tmp_path / "run")
    assert (config.data, config.steps, config.log_interval) == (str(text_file), 2, 1)


def test_a_run_is_dumped_as_a_file(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    outcome = resolvent("train", "--resume", run_dir, "--steps", 200, "--dump-config")
    assert outcome.code == 0, outcome.err
    again = load_config(written(tmp_path, outcome.out))
    recorded, _ = read_run(run_dir)
    assert again.model == recorded.model and again.data == recorded.data
    assert (again.steps, again.out) == (200, str(run_dir))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "line 1: unknown key 'stepz': did you mean steps?"),
        ("lr: fast", "line 1: learning_rate must be a finite number or null, got fast"),
        ("vocab_size: 300", "bytes has tokens of its own; leave out --vocab-size"),
        ("decay_fraction: 0.5", "decay_fraction has no effect on a cosine schedule"),
    ],
)
def test_faults_of_the_file_are_usage_errors(resolvent: Resolvent, tmp_path: Path, text: str, message: str):
    outcome = resolvent("train", "--config", written(tmp_path, text), "--out", tmp_path / "run")
    assert outcome.code == 2 and not (tmp_path / "run").exists()
    assert message in words(outcome.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "x", "--config", "run.yaml"], "the run keeps its settings; leave out --config"),
        (["--dry-run", "--lr-find"], "give one of --dry-run, --lr-find"),
        (["--dry-run", "--resume", "x"], "it trains nothing; leave out --resume"),
        (["--lr-find", "--overwrite"], "it trains nothing; leave out --overwrite"),
        (["--dump-config", "--plot", "a.png"], "it trains nothing; leave out --plot"),
        (["--tokens-per-second", "5"], "only --dry-run expects a speed; leave out --tokens-per-second"),
    ],
)
def test_options_without_effect_are_refused(
    resolvent: Resolvent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "steps: 5")
    outcome = resolvent("train", *arguments)
    assert outcome.code == 2 and message in words(outcome.err)


def test_dry_run_leaves_only_the_tokens(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    arguments = ["--data", text_file, "--out", tmp_path / "run", "--steps", 10, "--dry-run", *small]
    outcome = resolvent("train", *arguments, "--json", "-")
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert [path.name for path in tmp_path.iterdir()] == ["token-cache"]
    assert figures["tokens"] == 10 * 2 * 65
    assert figures["passes"] == figures["tokens"] / figures["text_tokens"]
    assert figures["timed_steps"] == 5 and figures["tokens_per_second"] > 0
    assert 257 * 32 == figures["embedding_parameters"] < figures["parameters"]


def test_a_run_reads_the_tokens_of_its_dry_run(
    resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--data", text_file, "--out", tmp_path / "run", "--steps", 1, *small]
    assert resolvent("train", *arguments, "--dry-run", "--tokens-per-second", 1000).code == 0
    monkeypatch.setattr("resolvent.data.cache.write_tokens", lambda *_: pytest.fail("tokenized again"))
    outcome = resolvent("train", *arguments)
    assert outcome.code == 0, outcome.err


def test_dry_run_takes_a_speed(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    arguments = ["--data", text_file, "--out", tmp_path / "run", "--steps", 1000]
    arguments += ["--final-eval-tokens", 1, "--eval-interval", 0]
    outcome = resolvent("train", *arguments, *small, "--dry-run", "--tokens-per-second", 1000)
    assert outcome.code == 0, outcome.err
    assert "Time      2:10 at 1,000 tokens/s, as given" in outcome.out
    assert "Tokens    130,000 in 1,000 steps" in outcome.out


def test_learning_rates_are_tried_without_a_run(
    resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("resolvent.training.lr_find._STEPS", 12)
    arguments = ["--data", text_file, "--out", tmp_path / "run", "--lr-find", "--plot", tmp_path / "lr.svg", *small]
    outcome = resolvent("train", *arguments)
    assert outcome.code == 0, outcome.err
    assert "learning rate" in outcome.out and "try --learning-rate" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.svg", "token-cache"]


def test_a_run_is_plotted(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    arguments = ["--data", text_file, "--out", tmp_path / "run", "--steps", 2, "--ema", 0.5, *small]
    outcome = resolvent("train", *arguments, "--plot", tmp_path / "loss.png", "--json", tmp_path / "result.json")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "result.json").read_text())["ema_validation"]["loss"] > 0
