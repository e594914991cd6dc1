import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from typer.testing import CliRunner

from experiments.quality import results
from experiments.quality.__main__ import app
from experiments.quality.language import Plan, Text, window_starts
from experiments.quality.models import build
from experiments.quality.needle import (
    LEAD,
    QUESTIONS,
    Experiment,
    Phrases,
    Probe,
    ask,
    draw_distances,
    draw_step,
    settings,
    summary,
)
from experiments.quality.training import Clock, Mode
from resolvent.data import build_tokenizer
from resolvent.evaluation.needle import ANSWER, FACT, NEAREST, PASS_KEYS, QUESTION

PLAN = Plan(width=128, layers=1, parameters=300_000, length=400, batch=3, steps=4, warmup=1, evaluations=2)
PROBE = Probe(longest=64, samples=5)
PLAIN = Mode(compiled=False, captured=False, autocast=False)
FOREVER = Clock(math.inf)


@pytest.fixture(scope="module")
def text() -> Text:
    lines = [f"Line {i}: so it goes.{FACT.format(key=37 * i)}{QUESTION} {i * i}.\n" * 20 for i in range(100, 160)]
    return Text.of_documents(lines[:57], lines[57:], build_tokenizer("bpe", lines, 400))


@pytest.fixture(scope="module")
def tokenizer(text: Text) -> Tokenizer:
    return Tokenizer.from_str(text.tokenizer)


@pytest.fixture(scope="module")
def phrases(tokenizer: Tokenizer) -> Phrases:
    return Phrases.of(tokenizer)


@pytest.fixture(scope="module")
def experiment(text: Text, phrases: Phrases) -> Experiment:
    return Experiment(build("transformer", PLAN.size(text.vocabulary)), text, PLAN, PLAIN, phrases, PROBE)


def test_phrases_are_those_of_the_keys_that_most_others_are_as_long_as(phrases: Phrases, tokenizer: Tokenizer):
    kept = len(phrases.facts)
    assert len(PASS_KEYS) // 4 < kept == len(phrases.questions) < len(PASS_KEYS)
    for fact, question in zip(phrases.facts[::5000], phrases.questions[::5000], strict=True):
        key = int(tokenizer.decode(question[-phrases.answer :]))
        assert key in PASS_KEYS
        assert tokenizer.decode(fact) == FACT.format(key=key)
        assert tokenizer.decode(question) == QUESTION + ANSWER.format(key=key)


def test_distances_are_spread_evenly_over_their_logarithms():
    drawn = draw_distances(20_000, 800, np.random.default_rng(0))
    assert drawn.shape == (20_000, QUESTIONS)
    assert drawn.min() == NEAREST and drawn.sum(axis=1).max() <= 800 and drawn.max() > 700
    # All six would not fit if they were long: the first to be drawn is log-uniform up to 720, the others up to less.
    below = [(drawn < bound).mean() for bound in (32, 64, 128, 256)]
    assert all(b - a > 0.1 for a, b in pairwise([0.0, *below])) and below[-1] < 0.97
    assert np.ptp(drawn.mean(axis=0)) < 5


def test_questions_follow_their_facts(phrases: Phrases):
    places, tokens = draw_step(phrases, 50, 400, seed=1, step=2)
    for row, written in zip(places, tokens, strict=True):
        assert row.min() >= 0 and row.max() <= 400
        assert (np.diff(row) >= 1).all()  # so no two overlap
        for stretch, phrase in zip(np.split(row, QUESTIONS), np.split(written, QUESTIONS), strict=True):
            fact = phrases.facts.shape[1]
            (key,) = np.flatnonzero((phrases.facts == phrase[:fact]).all(axis=1))
            assert np.array_equal(phrase[fact:], phrases.questions[key])
            gaps = np.diff(stretch) - 1
            assert gaps[fact - 1] >= NEAREST and np.delete(gaps, fact - 1).max() == 0
    assert places.max() == 400 and places.min() < 5


def test_a_step_writes_the_same_for_all(phrases: Phrases):
    first = draw_step(phrases, 4, 400, seed=0, step=7)
    assert all(np.array_equal(a, b) for a, b in zip(first, draw_step(phrases, 4, 400, seed=0, step=7), strict=True))
    for seed, step in [(0, 8), (1, 7), (7, 0)]:
        assert not np.array_equal(first[1], draw_step(phrases, 4, 400, seed, step)[1])
    least = QUESTIONS * (phrases.tokens + NEAREST) - 1
    draw_step(phrases, 4, least, 0, 0)
    with pytest.raises(ValueError, match=f"sequences of {least} tokens and more, got {least - 1}"):
        draw_step(phrases, 4, least - 1, 0, 0)


def test_a_step_reads_text_with_what_is_written_over_it(experiment: Experiment, text: Text, phrases: Phrases):
    experiment._draw(seed=3)
    window = experiment._window(torch.tensor([2]))
    starts = window_starts(len(text.train), PLAN.length, PLAN.batch, PLAN.steps, seed=3)[2]
    expected = np.stack([text.train[start : start + PLAN.length + 1].astype(np.int64) for start in starts])
    np.put_along_axis(expected, *draw_step(phrases, PLAN.batch, PLAN.length, seed=3, step=2), axis=1)
    assert np.array_equal(window.numpy(), expected)


def test_probes_ask_for_the_same_keys_in_the_same_text_at_all_distances(text: Text, phrases: Phrases):
    held_out = np.concatenate(text.validation).astype(np.int64)
    fact, question = phrases.facts.shape[1], phrases.questions.shape[1]
    assert Probe(65536).distances == [16, 64, 256, 1024, 4096, 16384, 65536] and Probe(255).distances == [16, 64]
    near, far = (PROBE.sequences(phrases, held_out, distance) for distance in (16, len(held_out)))
    assert near.shape == (5, LEAD + fact + 16 + question) and far.shape == (5, LEAD + fact + len(held_out) + question)
    assert torch.equal(near[:, : LEAD + fact + 16], far[:, : LEAD + fact + 16])
    assert torch.equal(near[:, -question:], far[:, -question:])
    filler = far[:, LEAD + fact : -question]
    assert torch.equal(filler.sort(dim=1).values[0], torch.from_numpy(np.sort(held_out)))  # once round the text
    for row in near.numpy():
        (key,) = np.flatnonzero((phrases.facts == row[LEAD : LEAD + fact]).all(axis=1))
        assert np.array_equal(row[-question:], phrases.questions[key])


class Recaller(nn.Module):
    """Ends every sequence with the key that it read, or with the token after it."""

    def __init__(self, vocabulary: int, key: slice, wrong: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.key, self.wrong, self.lm_head = vocabulary, key, wrong, nn.Identity()

    def hidden_states(self, input_ids: Tensor) -> tuple[Tensor, None]:
        key, hidden = input_ids[:, self.key], torch.zeros(*input_ids.shape, self.vocab_size)
        hidden[:, -key.shape[1] :] = 9.0 * F.one_hot((key + self.wrong) % self.vocab_size, self.vocab_size)
        return hidden, None


def test_exact_answers_need_recall(text: Text, phrases: Phrases, monkeypatch):
    monkeypatch.setattr("experiments.quality.needle.FORWARD_TOKENS", 250)  # two sequences at a time, and the last alone
    sequences = PROBE.sequences(phrases, np.concatenate(text.validation).astype(np.int64), 16)
    answer = phrases.answer
    (where,) = (
        i
        for i in range(LEAD, LEAD + phrases.facts.shape[1] // 2)
        if torch.equal(sequences[:, i : i + answer], sequences[:, -answer:])
    )
    key, context = slice(where, where + answer), torch.autocast("cpu", enabled=False)
    nats, exact = ask(Recaller(text.vocabulary, key), sequences, answer, context)
    sure = answer * math.log1p((text.vocabulary - 1) * math.exp(-9))
    assert exact.tolist() == [True] * 5 and nats.tolist() == pytest.approx([sure] * 5, rel=1e-4)
    assert summary(nats, exact) == {"exact": 1.0, "exact_error": 0.0, "nats": pytest.approx(sure, rel=1e-4)}
    nats, exact = ask(Recaller(text.vocabulary, key, wrong=1), sequences, answer, context)
    assert not exact.any() and nats.tolist() == pytest.approx([sure + 9 * answer] * 5, rel=1e-4)
    diverged = Recaller(text.vocabulary, key)
    diverged.lm_head = nn.Threshold(math.inf, math.nan)
    assert summary(*ask(diverged, sequences, answer, context)) == {"exact": 0.0, "exact_error": 0.0, "nats": None}
    assert summary(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))["exact_error"] == 0.5


def test_a_run_is_that_of_language_and_a_test(experiment: Experiment, text: Text):
    record = experiment.run(1e-3, 0, FOREVER)
    assert record["finite"] and [step for step, _ in record["curve"]] == [2, 4]
    assert list(record["needle"]) == ["16", "64"] and record["needle_without"] == {}
    assert all(score["nats"] > 0 for score in record["needle"].values())
    assert experiment.run(1e-3, 0, FOREVER)["needle"] == record["needle"]
    assert experiment.run(1e30, 0, FOREVER)["needle"] is None
    assert settings(PLAN, text, PROBE)["task"] == "needle"


def test_phase2_is_asked_again_without_each_mechanism(text: Text, phrases: Phrases):
    plan = dataclasses.replace(PLAN, steps=1)
    phase2 = Experiment(build("phase2/no-snr", plan.size(text.vocabulary)), text, plan, PLAIN, phrases, Probe(1024, 2))
    record = phase2.run(1e-2, 0, FOREVER)
    without = record["needle_without"]
    assert list(without) == ["bk", "kappa", "feedback", "resonance", "positions"]
    assert all(list(scores) == ["16", "64", "256"] for scores in without.values())  # 400 tokens are a sequence
    assert without["bk"]["16"]["nats"] != record["needle"]["16"]["nats"]
    assert phase2.run(1e30, 0, FOREVER)["needle_without"] is None


@pytest.mark.slow
def test_the_command_makes_missing_runs_and_the_report_shows_them(text: Text, tmp_path: Path):
    text.save(tmp_path / "text.npz")
    out = tmp_path / "runs.jsonl"

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    learn = [
        "needle",
        "--text",
        str(tmp_path / "text.npz"),
        "--out",
        str(out),
        "--plan",
        "tiny",
        "--steps",
        "2",
        "--commit",
        "c0ffee",
    ]
    learn += ["--length", "400", "--longest", "64", "--samples", "3"]
    call(*learn, "--models", "transformer")
    assert "the same command goes on" in call(*learn, "--models", "transformer,gla", "--budget-seconds", "0.001")
    call(*learn, "--models", "transformer", "--seeds", "2")
    call(*learn, "--models", "transformer", "--muon-ratio", "5", "--no-switching")
    assert [record["seed"] for record in results.read([out])] == [0, 1, 0]
    assert results.read([out])[-1]["settings"]["muon_ratio"] == 5 and results.read([out])[-1]["commit"] == "c0ffee"
    output = call("report", str(out))
    assert "exact answers in percent by distance" in output and "± 0.0" in output
    assert "switched off" not in output
    call(*learn, "--models", "phase2/bare/bk")
    title = "phase2/bare/bk: exact answers in percent by distance, a mechanism switched off after training, by seed"
    assert title in " ".join(call("report", str(out)).split())
    call("plot", str(out), "--out", str(tmp_path / "runs.svg"))
    assert "tokens between fact and question" in (tmp_path / "runs.svg").read_text()


def test_characters_are_refused(tmp_path: Path):
    (tmp_path / "text.txt").write_text("so it goes\n" * 50)
    Text.of_characters([tmp_path / "text.txt"]).save(tmp_path / "text.npz")
    learn = ["needle", "--text", str(tmp_path / "text.npz"), "--out", str(tmp_path / "runs"), "--commit", "c0ffee"]
    result = CliRunner().invoke(app, learn)
    assert result.exit_code == 2 and "take a tokenizer" in " ".join(result.output.split())
