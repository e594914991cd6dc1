import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent import benchmark
from resolvent.benchmark import timing
from resolvent.benchmark.harness import Bench

Resolvent = Callable[..., Any]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.01)


def test_all_sections_are_measured_and_written(resolvent: Resolvent, tmp_path: Path):
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--json", tmp_path / "figures.json")
    assert outcome.code == 0, outcome.out + outcome.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    names = [(row["section"], row["name"]) for row in figures["rows"]]
    assert names == [
        ("operators", "memory forward, B1 N330 H2 K16"),
        ("operators", "memory forward + backward, B1 N330 H2 K16"),
        ("operators", "memory forward + backward, consolidated, B1 N330 H2 K16"),
        ("operators", "memory forward + backward, consolidated / not"),
        ("operators", "BK-Core forward, B1 N130 H2"),
        ("operators", "BK-Core forward + backward, B1 N130 H2"),
        ("operators", "head and loss forward + backward, T100 D32 V257"),
        ("training", "tiny, B1 N100"),
        ("training", "tiny, B1 N100, ours / GPT"),
        ("training", "tiny, B1 N100, peak memory"),
        ("training", "tiny, B1 N100, consolidation"),
        ("memory", "tiny, B1 N256"),
        ("decoding", "tiny, B1, reading 200 tokens"),
        ("decoding", "tiny, B1, generating after 20 tokens"),
        ("decoding", "tiny, B1, generating after 200 tokens"),
        ("decoding", "tiny, B1, generating, after 200 / after 20"),
        ("decoding", "tiny, B3, generating after 40 tokens"),
        ("decoding", "tiny, B3, generating after 40 tokens, ours / GPT"),
        ("serving", "tiny, 3 answers of 6 tokens"),
    ]
    assert not any(row["failures"] for row in figures["rows"])
    share = figures["rows"][10]["ours"]  # the difference of two speeds, which noise may turn negative
    assert share < 1
    assert all(row["ours"] > 0 for row in figures["rows"] if row is not figures["rows"][10])
    errors = [row["error"] for row in figures["rows"] if row["unit"] in ("ms", "tokens/s")]
    assert all(error < 1e-4 for error in errors)
    training = figures["rows"][7]
    assert list(training["peers"]) == ["GPT", "GPT with our parts"]
    peak = figures["rows"][9]
    assert peak["unit"] == "GiB" and len(peak["peers"]) == 1 and all(gib > 0 for gib in peak["peers"].values())
    assert 0 < training["fraction"] < 1 and training["times_better"] > 0
    assert figures["scale"] == "quick" and figures["ceilings"]["bytes_per_second"] > 1e8
    assert all(name in outcome.out for _, name in names)
    assert "copies at" in outcome.out and "failed" not in outcome.out


def test_sections_can_be_chosen(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    sections = {name: lambda bench, name=name: called.append(name) for name in benchmark.SECTIONS}
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    assert resolvent("benchmark", "--quick", "--device", "cpu", "--only", "decoding,operators").code == 0
    assert called == ["decoding", "operators"]
    assert resolvent("benchmark", "--quick", "--device", "cpu").code == 0
    assert called[2:] == list(sections)


def test_an_unknown_section_is_named(resolvent: Resolvent):
    outcome = resolvent("benchmark", "--only", "operators,speed")
    assert outcome.code == 2
    message = " ".join(outcome.err.replace("│", "").split())
    assert "'speed' is none of operators, training, memory, decoding, serving." in message


def test_failures_are_shown_with_exit_code_1(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def measure(bench: Bench) -> None:
        good = bench.compete("good", lambda check: 2.0)
        bad = bench.compete("bad", lambda check: check(0.5), tolerance=0.1)
        bench.add("section", "good", "ms", good)
        bench.add("section", "bad", "ms", bad)

    monkeypatch.setattr(benchmark, "SECTIONS", {"section": measure})
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--json", tmp_path / "figures.json")
    assert outcome.code == 1
    why = "WrongResultError: relative error 5.0e-01, allowed is 1e-01: not measured"
    assert f"failed: section, bad, ours: {why}" in outcome.out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["ours"] for row in figures["rows"]] == [2.0, None]
    assert figures["failures"] == [f"section, bad, ours: {why}"]


def test_compare_shows_the_change_of_every_figure(
    resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    figures, path = iter([2.0, 1.0]), tmp_path / "figures.json"

    def measure(bench: Bench) -> None:
        bench.add_figure("section", "row", "ms", next(figures))

    monkeypatch.setattr(benchmark, "SECTIONS", {"section": measure})
    assert resolvent("benchmark", "--quick", "--device", "cpu", "--json", path).code == 0
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--compare", path)
    assert outcome.code == 0
    assert "change against the stored run of scale quick (CPU, PyTorch" in outcome.out
    assert "section: row ms 2 1 -50.0 %" in " ".join(outcome.out.split())


def test_a_stored_run_is_read_before_anything_is_measured(resolvent: Resolvent, tmp_path: Path):
    outcome = resolvent("benchmark", "--compare", tmp_path / "missing.json")
    assert outcome.code == 1 and "missing.json" in outcome.err and "copies at" not in outcome.out
