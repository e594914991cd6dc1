"""Commands that read conversations: the answers are scored, as in training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.data import load_tokenizer
from resolvent.training.corpus import load_corpus
from resolvent.training.run_folder import read_run
from tests.cli.conftest import call

from .test_inspect_command import data_of

Resolvent = Callable[..., Any]


def write_talks(path: Path, numbers: range) -> Path:
    """Write conversations of two turns."""
    records = [
        [
            {"role": "user", "content": f"{n} and {n}?"},
            {"role": "assistant", "content": f"That is {2 * n}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
        for n in numbers
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    return path


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talks(tmp_path_factory.mktemp("talks") / "talks.jsonl", range(20))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, talks: Path, small: list[str]) -> Path:
    run = tmp_path_factory.mktemp("runs") / "taught"
    options = ["--format", "chat", "--data", talks, "--final-eval-tokens", 0, "--out", run, "--steps", 3]
    assert call("train", *options, *small) == 0
    return run


def test_run_on_conversations_is_scored_as_in_training(resolvent: Resolvent, taught: Path, talks: Path):
    outcomes = [resolvent("evaluate", taught, *options) for options in ([], ["--data", talks, "--held-out"])]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    last = json.loads((taught / "metrics.jsonl").read_text().splitlines()[-1])
    for outcome in outcomes:
        assert f"{taught} on the assistant's answers in " in outcome.out
        assert f"{last['validation_loss']:.4f}" in outcome.out
        assert f"{last['validation_bits_per_byte']:.4f}" in outcome.out


def test_other_conversations_are_scored_by_their_answers(
    resolvent: Resolvent, taught: Path, run_dir: Path, tmp_path: Path
):
    other = write_talks(tmp_path / "other.jsonl", range(20, 23))
    for run in (taught, run_dir):  # of conversations, and of text
        outcome = resolvent("evaluate", run, "--data", other, "--format", "chat", "--json", "-")
        assert outcome.code == 0, outcome.err
        values = json.loads(outcome.out)
        assert values["tokens"] == 3 * (len("That is 40.") + 1 + len("Yes.") + 1)
        assert values["loss"] * values["tokens"] == pytest.approx(
            values["bits_per_byte"] * 3 * len("That is 40.Yes.") * 0.69314718, rel=1e-6
        )


def test_all_of_the_conversations_are_the_parts_of_the_run(resolvent: Resolvent, taught: Path, talks: Path):
    whole = json.loads(resolvent("evaluate", taught, "--data", talks, "--format", "chat", "--json", "-").out)
    corpus = load_corpus(read_run(taught)[0], load_tokenizer(taught))
    assert whole["tokens"] == corpus.train.count_targets() + corpus.validation.count_targets()


def test_inspection_reads_a_conversation_with_its_special_tokens(resolvent: Resolvent, taught: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    outcome = resolvent("inspect", taught, "--out", page, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    text = "".join(data_of(page)["tokens"])
    assert "That is" in text and "Sure?" in text
    outcome = resolvent("inspect", taught, "--compare", taught, "--out", page, "--device", "cpu")
    assert outcome.code == 1 and outcome.err.endswith("give --text\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "chat"], "--format says how to read a text: name the text with --data"),
        (["--data", "x", "--held-out", "--format", "chat"], "leave out --format"),
        (["--data", "x", "--text-field", "y", "--format", "chat"], "leave out --text-field"),
    ],
)
def test_options_without_effect_are_refused(resolvent: Resolvent, taught: Path, options: list[str], message: str):
    outcome = resolvent("evaluate", taught, *options)
    assert outcome.code == 1 and message in outcome.err


def test_records_of_messages_name_the_format(resolvent: Resolvent, run_dir: Path, talks: Path):
    outcome = resolvent("evaluate", run_dir, "--data", talks)
    assert outcome.code == 1 and outcome.err.endswith("conversations are read with --format chat\n")


def test_measures_of_text_refuse_conversations(resolvent: Resolvent, taught: Path):
    outcome = resolvent("evaluate", "positions", taught)
    assert outcome.code == 1 and "learned from conversations, and this measure needs text" in outcome.err
