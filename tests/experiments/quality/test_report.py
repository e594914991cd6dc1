import io
import json
import math
import statistics
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from experiments.quality import results
from experiments.quality.__main__ import Jobs, app, expand
from experiments.quality.plots import plot
from experiments.quality.report import (
    average,
    differences,
    left_out,
    losses,
    needles,
    positions,
    recalls,
    switched_off,
    tables,
)

RESULTS = Path(results.__file__).with_name("results")
SETTINGS = {"task": "language", "width": 8, "layers": 6, "parameters": 1_000, "steps": 10, "batch": 2, "length": 16}


def run(model: str, rate: float, seed: int, loss: float | None, **others) -> results.Record:
    return {
        "settings": SETTINGS,
        "model": model,
        "learning_rate": rate,
        "seed": seed,
        "finite": loss is not None,
        "loss": loss,
        "best_loss": loss,
        "bits_per_byte": None if loss is None else loss / 2,
        "loss_by_position": None if loss is None else {"0-64": loss + 1, "64-128": loss - 1},
        "parameters": 1_000,
        "state_bytes": 2048,
        "tokens_per_second": 100.0,
    } | others


RUNS = [
    *(run("phase2", 1e-3, seed, loss) for seed, loss in enumerate([3.0, 3.2, 3.1])),
    *(run("phase2/no-snr", 1e-3, seed, loss) for seed, loss in enumerate([2.9, 3.15, 3.05])),
    run("phase2", 2e-3, 0, 3.6),
    run("gla", 1e-3, 0, 3.3),
    run("gla", 4e-3, 0, None),
]


def lines(records: list[results.Record]) -> list[list[str]]:
    console = Console(width=250, file=io.StringIO())
    console.print(*tables(records))
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_best_learning_rates():
    assert results.best_learning_rate(RUNS[:3] + RUNS[6:7], "loss", smallest=True) == 1e-3
    assert results.best_learning_rate(RUNS[7:], "loss", smallest=True) == 1e-3
    half = [run("a", 1.0, 0, 1.0), run("a", 1.0, 1, None), run("a", 2.0, 0, 5.0)]
    assert results.best_learning_rate(half, "loss", smallest=True) == 2.0
    assert results.best_learning_rate(half[::2], "loss", smallest=False) == 2.0
    assert results.best_learning_rate([], "loss", smallest=True) is None


def test_tables_rank_models_and_show_paired_differences():
    text = lines(RUNS)
    error = statistics.stdev([3.0, 3.2, 3.1]) / 3**0.5
    assert ["phase2", "0.001", "3", "3.1000", "±", f"{error:.4f}"] in [line[:6] for line in text]
    gla = next(line for line in text if line[:2] == ["gla", "0.001"])
    assert gla[2:4] == ["1", "3.3000"] and gla[-3:] == ["1", "of", "2"]
    gaps = [-0.1, -0.05, -0.05]
    error = statistics.stdev(gaps) / math.sqrt(3)
    expected = ["phase2/no-snr", "3", f"{sum(gaps) / 3:+.4f}", "±", f"{error:.4f}", f"{sum(gaps) / 3 / error:+.1f}"]
    assert expected in text
    assert any(line[:1] == ["gla"] and line[1:] == ["3.3000", "-", "-", "(1", "not", "finite)"] for line in text)
    assert ["gla", "4.3000", "2.3000"] in text


def test_averages():
    assert average([]) == "-" and average([1.5], 2) == "1.50"
    assert average([1.0, 2.0], signed=True) == "+1.5000 ± 0.5000"


def test_recall_is_shown_against_the_state():
    def recalled(model: str, width: int, rate: float, accuracy: float, state: int) -> results.Record:
        parts = {"64x4": 1.0, "64x8": 2 * accuracy - 1}
        settings = {"task": "mqar", "width": width, "heads": 2}
        return run(model, rate, 0, None, settings=settings, accuracy=accuracy, accuracies=parts, state_bytes=state) | {
            "finite": True
        }

    records = [
        recalled("gla", 64, 1e-3, 0.6, 1024),
        recalled("gla", 64, 1e-2, 0.8, 1024),
        recalled("gla", 128, 1e-2, 0.9, 4096),
    ]
    text = lines(records)
    assert ["gla", "0.01", "1", "1.0", "0.800", "1.000", "0.600"] in text
    assert text.index(["gla", "1.0", "0.800", "64", "2"]) + 1 == text.index(["gla", "4.0", "0.900", "128", "2"])


def test_incomplete_lines_are_ignored(tmp_path: Path):
    path = tmp_path / "new" / "runs.jsonl"
    assert results.read([path]) == []
    results.append(path, RUNS[0])
    with path.open("a") as file:
        file.write('{"model": "ph')
    assert results.read([path]) == [RUNS[0]]
    results.append(path, RUNS[1])
    assert results.read([path]) == RUNS[:2]


def test_only_missing_runs_are_made(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    for record in RUNS:
        results.append(path, record)

    def wanted(model: str, rates: str, seeds: int, settings=SETTINGS) -> list[tuple[float, int]]:
        jobs = Jobs(path, settings, rates, range(seeds), "loss", True)
        return [(record["learning_rate"], record["seed"]) for record in jobs.of(model)]

    assert wanted("phase2", "1e-3,2e-3", 2) == [(2e-3, 1)]
    assert wanted("phase2", "1e-3", 3) == [] and wanted("phase2", "best", 4) == [(1e-3, 3)]
    assert wanted("gla", "1e-3,4e-3", 2) == [(1e-3, 1), (4e-3, 1)]
    assert wanted("phase2/no-bk", "best", 1) == [(1e-3, 0)]
    assert wanted("gla", "1e-3", 1, SETTINGS | {"width": 9}) == [(1e-3, 0)]
    measured = SETTINGS | {"evaluations": 1, "extrapolate": 512}  # changes no training
    assert wanted("phase2", "1e-3,2e-3", 2, measured) == [(2e-3, 1)]
    with pytest.raises(typer.BadParameter, match="holds no run of mamba2 with these settings"):
        wanted("mamba2", "best", 1)


RECALLED = [
    dict(settings=dict(task="mqar", width=width, heads=2), model=model, learning_rate=1e-3, seed=0, finite=True)
    | dict(state_bytes=width * 64, accuracy=accuracy, accuracies={"64x4": accuracy})
    for model, width, accuracy in [("gla", 64, 0.5), ("gla", 128, 0.8), ("phase2", 64, 0.7)]
]


def test_plots_show_the_tables(tmp_path: Path):
    def drawn(records: list[results.Record]) -> str:
        plot(records, tmp_path / "runs.svg")
        return (tmp_path / "runs.svg").read_text()

    picture = drawn(RUNS + RECALLED)
    for text in ("Phase 2", "GLA", "SNR filter", "cost of leaving it out", "held-out loss", "state, KB"):
        assert text in picture
    assert picture == drawn(RUNS + RECALLED)
    assert "prefers-color-scheme: dark" in picture and "var(--ink)" in picture and "#010203" not in picture
    zeroed = [run(name, 1e-3, 0, 3.0, switched_off={"bk": [0.2, 0.01]}) for name in ("phase2", "phase2/attention")]
    assert drawn(zeroed).count("BK-Core") == drawn(zeroed[:1]).count("BK-Core") > 0  # one row, a mark for each model
    assert drawn(RUNS).count("Phase 2") > drawn([*RUNS[:3], *RUNS[7:]]).count("Phase 2")
    once = run("phase2/hybrid/window-8", 1e-3, 0, 2.0)
    assert "window-8" not in drawn([*RUNS, once]) and "window-8" in drawn([RUNS[0], once])
    windows = [run(f"phase2/{name}", 1e-3, 0, 2.0) for name in ("attention", "hybrid/window-4", "hybrid/window-8")]
    assert "training sequence of 16" in drawn(windows) and "nats above attention" not in drawn(windows[:2])
    assert "cost of leaving it out" not in drawn(RECALLED)
    larger = run("phase2", 1e-3, 0, 2.5, settings=SETTINGS | {"parameters": 4_000})
    assert "FLOPs of training" in drawn([*RUNS[:1], larger]) and "FLOPs of training" not in picture
    with pytest.raises(ValueError, match="no runs"):
        plot(RUNS[-1:], tmp_path / "none.svg")


def test_rows_of_pictures():
    assert losses(RUNS) == [[("phase2", [3.0, 3.2, 3.1]), ("gla", [3.3])]]
    ((name, gaps),) = differences(RUNS)[0]
    assert name == "phase2/no-snr"
    assert gaps == pytest.approx([-0.1, -0.05, -0.05])
    rows = [(row.name, row.kilobytes, row.accuracies) for row in recalls(RECALLED)]
    assert rows == [("gla", 4.0, [0.5]), ("gla", 8.0, [0.8]), ("phase2", 4.0, [0.7])]


def test_what_is_left_out_is_compared_with_the_same_model_with_it():
    attention = [run("phase2/attention", 1e-3, seed, 2.0 + seed) for seed in (0, 1)]
    without = [run("phase2/attention/no-conv", 1e-3, seed, 2.5 + seed) for seed in (1, 2)]
    started = [run("phase2/no-reach", 1e-3, 0, 2.9)]
    (rows,) = left_out([*RUNS, *attention, *without, *started])
    assert [row.name for row in rows] == ["phase2/no-snr", "phase2/attention/no-conv"]
    assert rows[1].values == [0.5]
    ((names, _),) = [zip(*losses([*RUNS, *attention, *without])[0], strict=True)]
    assert names == ("phase2", "gla", "phase2/attention")
    table = lines([*attention, *without])
    assert ["phase2/attention/no-conv", "+0.5000", "-"] in table


def test_costs_of_mechanisms_and_losses_by_position_are_those_of_whole_models():
    long = {"by_position": {"0-64": 3.0}, "in_windows": {"0-64": 3.5}, "stretches": 1}
    off = {"switched_off": {"bk": [0.2, 0.01], "snr": [0.0, 0.0]}}
    records = [run("phase2", 1e-3, seed, 3.0 + seed, **off, long=long) for seed in (0, 1)]
    records.append(run("phase2/no-snr", 1e-3, 0, 3.0, switched_off={"bk": [0.3, 0.01]}))
    (rows,) = switched_off(records)
    assert rows == [("phase2: bk", [0.2, 0.2]), ("phase2: snr", [0.0, 0.0])]
    assert positions(records) == [{"phase2": {64: 4.5, 128: 2.5}}]
    assert positions(records, long=True) == [{"phase2": {64: 3.0}, "phase2 in windows": {64: 3.5}}]


def test_every_run_is_listed_with_what_makes_it_again():
    muon = run("gla", 4e-3, 1, 3.0, settings=SETTINGS | {"muon_ratio": 5.0}, commit="c0ffee", corpus_sha256="beef")
    muon |= {"tokens": 32_768, "loss_by_part": {"code": 2.5}}
    table = lines([muon])
    assert ["gla", "1", "Muon", "0.004", "0.02", "3.0000", "32,768", "beef", "c0ffee"] in table
    assert ["gla", "2.5000"] in table
    assert ["gla", "0", "AdamW", "0.004", "-", "not", "finite", "-", "-", "-"] in lines(RUNS)


def asked(model: str, seed: int, loss: float | None, *shares: float) -> results.Record:
    scores = [{"exact": share, "exact_error": 0.125, "nats": 2.0 + seed if share else None} for share in shares]
    found = dict(zip(("16", "64"), scores, strict=True)) if loss is not None else None
    return run(model, 1e-3, seed, loss, settings={"task": "needle", "width": 8}, needle=found)


ASKED = [
    asked("gla", 0, 3.0, 1.0, 0.5),
    asked("gla", 1, 3.1, 0.75, 0.0),
    asked("phase2/no-reach", 0, 3.2, 0.5, 0.0),
    asked("mamba2", 0, None),
]


def test_recall_is_shown_against_distance(tmp_path: Path):
    ((gla, phase2),) = needles(ASKED)
    assert gla == ("gla", 2, {16: (0.875, 0.125), 64: (0.25, 0.25)}, {16: [2.0, 3.0], 64: [2.0]})
    assert phase2 == ("phase2/no-reach", 1, {16: (0.5, 0.125), 64: (0.0, 0.125)}, {16: [2.0], 64: []})
    text = lines(RUNS + ASKED)
    assert ["gla", "2", "87.5", "±", "12.5", "25.0", "±", "25.0"] in text
    assert ["phase2/no-reach", "1", "2.00", "-"] in text
    plot(ASKED, tmp_path / "runs.svg")
    picture = (tmp_path / "runs.svg").read_text()
    assert "GLA" in picture and "Phase 2, no-reach" in picture and "Mamba-2" not in picture
    assert lines([ASKED[-1]])  # of runs that all failed, too


def test_groups_of_models():
    assert expand("gla,peers,phase2") == ["gla", "transformer", "mamba2", "mamba3", "gated-deltanet", "phase2"]
    assert "phase2/no-snr" in expand("ablation")


def test_the_commands_from_text_to_table(tmp_path: Path):
    (tmp_path / "text.txt").write_text("".join(f"{i}: so it goes\n" for i in range(400)))
    text, out = tmp_path / "text.npz", tmp_path / "runs.jsonl"

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    call("tokens", "--corpus", str(tmp_path / "text.txt"), "--tokenizer", "characters", "--out", str(text))
    learn = ["language", "--text", str(text), "--plan", "tiny", "--out", str(out), "--steps", "2", "--commit", "c0ffee"]
    call(*learn, "--models", "phase2/bare", "--lr", "1e-3,2e-3")
    assert [json.loads(line)["learning_rate"] for line in out.read_text().splitlines()] == [1e-3, 2e-3]
    call(*learn, "--models", "phase2/bare", "--lr", "1e-3,2e-3")
    assert len(out.read_text().splitlines()) == 2
    output = call(*learn, "--models", "phase2/bare", "--lr", "3e-3", "--budget-seconds", "0.001")
    assert len(out.read_text().splitlines()) == 2 and "the same command goes on" in output
    assert "phase2/bare" in call("report", str(out))
    call(*learn, "--models", "phase2", "--lr", "1e-3")
    call("plot", str(out), "--out", str(tmp_path / "runs.svg"))
    assert "Phase 2" in (tmp_path / "runs.svg").read_text()


def test_history_keeps_files_of_origin_apart(tmp_path: Path):
    old, older = run("phase2", 1e-3, 0, 3.0), run("phase2", 1e-3, 0, 4.0)
    file = tmp_path / "history.jsonl"
    for origin, record in (("language-old", old), ("language-older", older)):
        results.append(file, {"from": origin} | record)
    outcome = CliRunner().invoke(app, ["report", str(file)])
    assert outcome.exit_code == 0, outcome.output
    assert "from language-old," in outcome.output and "from language-older," in outcome.output
    assert "3.0000" in outcome.output and "4.0000" in outcome.output


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_every_file_of_results_is_reported(file: Path):
    records = results.read([file])
    assert records and tables(records)
    assert all(("from" in record) == (file.stem == "history") for record in records)
