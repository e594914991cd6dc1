import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent import benchmark
from resolvent.benchmark import timing
from resolvent.benchmark.harness import Bench, Measurement
from tests.cli.conftest import words

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


Measure = Callable[[Bench], object]


def section_of(*measures: Measure) -> dict[str, Callable[[str], list[Measurement]]]:
    """The only section, whose measurements have a letter for a name."""
    return {"section": lambda _: [Measurement("section", "abc"[i], run) for i, run in enumerate(measures)]}


def test_sections_can_be_chosen(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []

    def measurements(name: str) -> Callable[[str], list[Measurement]]:
        return lambda _: [Measurement(name, "all", lambda bench: called.append(name))]

    sections = {name: measurements(name) for name in benchmark.SECTIONS}
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    assert resolvent("benchmark", "--quick", "--device", "cpu", "--only", "decoding,operators").code == 0
    assert called == ["decoding", "operators"]
    assert resolvent("benchmark", "--quick", "--device", "cpu").code == 0
    assert called[2:] == list(sections)


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["training:base-hybrid"], ["base-hybrid, B16 N1024", "base-hybrid, B1 N16384", "base-hybrid, B1 N65536"]),
        (["training:base"], ["base, B16 N1024"]),
        (["training:B1 N65536", "training:base"], ["base-hybrid, B1 N65536", "base, B16 N1024"]),
        (["decoding:B64"], ["base, B64", "base-hybrid, B64"]),
        (["serving:8 answers of 128 tokens", "serving"], [f"base, {n} answers of 128 tokens" for n in (8, 1, 64, 256)]),
    ],
)
def test_cases_of_a_section_are_chosen_by_a_part_of_their_name(only: list[str], names: list[str]):
    assert [case.name for case in benchmark.select(only, "cuda")] == names


def test_an_unknown_case_is_named(resolvent: Resolvent):
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--only", "training:huge")
    assert outcome.code == 2
    assert "'huge' is no part of a name in training, which has: tiny, B1 N100." in words(outcome.err)


def test_figures_are_written_after_every_row(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path, seen = tmp_path / "figures.json", []

    def measure(bench: Bench) -> None:
        for name in ("first", "second"):
            bench.add_figure("section", name, "ms", 1.0)
            figures = json.loads(path.read_text())
            seen.append(([row["name"] for row in figures["rows"]], figures["missing"]))

    monkeypatch.setattr(benchmark, "SECTIONS", section_of(measure))
    assert resolvent("benchmark", "--quick", "--device", "cpu", "--json", path).code == 0
    assert seen == [(["first"], ["section: a"]), (["first", "second"], ["section: a"])]
    assert json.loads(path.read_text())["missing"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("target", ["-", "file"])
def test_interrupted_run_keeps_and_shows_what_was_measured(
    resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, target: str
):
    def first(bench: Bench) -> None:
        bench.add_figure("section", "row of a", "ms", 12.5)

    def second(bench: Bench) -> None:
        bench.add_figure("section", "row of b", "ms", 0.5)
        bench.measure("b", lambda check: signal.raise_signal(number), {"peer": lambda: 1.0})

    monkeypatch.setattr(benchmark, "SECTIONS", section_of(first, second, first))
    path = tmp_path / "figures.json"
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--json", path if target == "file" else "-")
    assert outcome.code == 128 + number
    figures = json.loads(path.read_text() if target == "file" else outcome.out)
    assert [row["name"] for row in figures["rows"]] == ["row of a", "row of b"]
    assert figures["missing"] == ["section: b", "section: c"]
    if target == "file":
        assert "row of a ms 12.5" in " ".join(outcome.out.split())
        assert "stopped; not complete: section: b; section: c" in outcome.out
    assert "2/3 b: ours" in outcome.out + outcome.err and "b: peer" not in outcome.out + outcome.err


def test_a_file_that_cannot_be_written_ends_the_run_with_its_tables(
    resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path = tmp_path / "folder" / "figures.json"
    path.parent.mkdir()

    def measure(bench: Bench) -> None:
        path.parent.rmdir()
        bench.add_figure("section", "row", "ms", 12.5)

    monkeypatch.setattr(benchmark, "SECTIONS", section_of(measure))
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--json", path)
    assert outcome.code == 1 and str(path.parent) in outcome.err
    assert "row ms 12.5" in " ".join(outcome.out.split())


def test_an_unknown_section_is_named(resolvent: Resolvent):
    outcome = resolvent("benchmark", "--only", "operators,speed")
    assert outcome.code == 2
    assert "'speed' is none of operators, training, memory, decoding, serving." in words(outcome.err)


def test_failures_are_shown_with_exit_code_1(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def measure(bench: Bench) -> None:
        good = bench.measure("good", lambda check: 2.0)
        bad = bench.measure("bad", lambda check: check(0.5), tolerance=0.1)
        bench.add("section", "good", "ms", good)
        bench.add("section", "bad", "ms", bad)

    monkeypatch.setattr(benchmark, "SECTIONS", section_of(measure))
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

    monkeypatch.setattr(benchmark, "SECTIONS", section_of(measure))
    assert resolvent("benchmark", "--quick", "--device", "cpu", "--json", path).code == 0
    outcome = resolvent("benchmark", "--quick", "--device", "cpu", "--compare", path)
    assert outcome.code == 0
    assert "change against the stored run of scale quick (CPU, PyTorch" in outcome.out
    assert "section: row ms 2 1 -50.0 %" in " ".join(outcome.out.split())


def test_a_stored_run_is_read_before_anything_is_measured(resolvent: Resolvent, tmp_path: Path):
    outcome = resolvent("benchmark", "--compare", tmp_path / "missing.json")
    assert outcome.code == 1 and "missing.json" in outcome.err and "copies at" not in outcome.out
