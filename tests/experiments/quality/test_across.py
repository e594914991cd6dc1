import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.quality import across, results
from experiments.quality.__main__ import app

SETTINGS = {"task": "language", "width": 8, "layers": 6, "parameters": 1_000, "steps": 10, "batch": 2, "length": 16}


def run(model: str, seed: int, loss: float | None, rate: float = 4e-3, **settings) -> results.Record:
    by_position = None if loss is None else {"0-64": loss + 1, "64-128": loss - 1}
    shared = {"settings": SETTINGS | settings, "model": model, "learning_rate": rate, "seed": seed, "state_bytes": 2048}
    return shared | {"finite": loss is not None, "loss": loss, "loss_by_position": by_position}


def lines(records: list[results.Record], base: str | None = None) -> list[list[str]]:
    console = Console(width=250, file=io.StringIO())
    console.print(*across.tables(records, base))
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_muon_and_adamw_are_compared_at_their_best_rates_by_seed():
    adamw = [run("gla", 0, 3.5, 2e-3), run("gla", 0, 3.25), run("gla", 1, 3.5), run("gla", 0, None, 8e-3)]
    muon = [
        run("gla", 0, 3.0, muon_ratio=5.0),
        run("gla", 1, 3.125, muon_ratio=5.0),
        run("gla", 0, 3.5, muon_ratio=10.0),
    ]
    assert across.muon_gain(adamw + muon) == [-0.25, -0.375]
    table = lines([*adamw, *muon, run("phase2", 0, 2.0)])
    losses = "gla 3.5000 3.3750 ± 0.1250 - 3.0625 ± 0.0625 3.5000 -0.3125 ± 0.0625"
    assert losses.split() in table
    assert lines(adamw[1:3]) == [[]]  # one optimiser at one rate


def test_every_model_is_shown_at_its_best_optimiser_and_rates():
    muon = [run("gla", seed, loss, muon_ratio=5.0) for seed, loss in enumerate([3.0, 3.5])]
    slower = [
        run("gla", 0, 3.125, 2e-3, muon_ratio=10.0)
    ]  # the same rate of matrices; worse with the seed that both have
    failed = [run("gla", 0, 1.0, 8e-3, muon_ratio=5.0), run("gla", 1, None, 8e-3, muon_ratio=5.0)]
    assert across.ranked([*muon, *failed])[0] == (("Muon", 0.02, 4e-3), 3.0)  # rates with a run that failed come last
    adamw = [run("gla", 1, 3.75), run("mamba2", 0, 3.25), run("phase2", 0, None)]
    assert across.ranked([*muon, *slower]) == [(("Muon", 0.02, 4e-3), 3.0), (("Muon", 0.02, 2e-3), 3.125)]
    assert across.ranked([*muon, *slower, *adamw[:1]])[0] == (("Muon", 0.02, 2e-3), 3.125)  # no seed in common
    table = lines([*muon, *slower, *adamw[1:]])
    next_best = ["Muon", "0.02,", "rest", "0.002", "+0.1250"]
    assert ["gla", "Muon", "0.02", "0.004", "2", "3.2500", "±", "0.2500", "2", *next_best] in table
    assert ["mamba2", "AdamW", "0.004", "0.004", "1", "3.2500", "1", "-", "-"] in table
    assert not any(line[:1] == ["phase2"] for line in table)


def test_the_lead_in_flops_lies_between_the_sizes_of_the_base():
    sizes = [dict(parameters=1_000), dict(parameters=4_000, width=16)]
    base = [run("gla", 0, loss, **size) for loss, size in zip([3.0, 2.0], sizes, strict=True)]
    ours = [run("phase2", 0, loss, **size) for loss, size in zip([2.5, 1.5], sizes, strict=True)]
    (points,) = across.scaling([*base, *ours])
    assert across.flops_factor(points, points[0], "phase2", "gla") == pytest.approx(
        2.0
    )  # half of the way to four times
    assert across.flops_factor(points, points[1], "phase2", "gla") is None  # beyond the line
    assert across.flops_factor(points, points[0], "mamba2", "gla") is None
    table = lines([*base, *ours], "gla")
    assert ["1,000", "-0.5000", "2.00"] in table and ["4,000", "-0.5000", "-"] in table


def test_windows_are_compared_with_attention_everywhere_of_the_same_training_length():
    long = dict(length=32, batch=1)
    records = [
        run("phase2/attention", 0, 2.0),
        run("phase2/hybrid/window-8", 0, 2.5),
        run("phase2/hybrid/window-all", 0, 2.25),
        run("phase2/attention", 0, 3.0, **long),
        run("phase2/hybrid/window-8", 0, 2.75, **long),
        run("phase2/hybrid/window-8", 1, 9.0, **long),
        run("phase2/attention", 0, 1.0, parameters=5),
        run("phase2/hybrid/window-8", 0, 1.5, parameters=5),
        run("phase2/hybrid/window-4", 0, 1.0, width=9),
    ]
    assert across.window_gaps(records) == [
        (16, 8.0, {64: 0.5, 128: 0.5}),
        (16, math.inf, {64: 0.25, 128: 0.25}),
        (32, 8.0, {64: -0.25, 128: -0.25}),
    ]
    assert across.window_gaps(records[1:3]) == []


def test_a_scaling_line_holds_sizes_that_read_the_same_text():
    small = [run("gla", seed, 3.0 + seed / 4) for seed in (0, 1)]
    large = [
        run("gla", 0, 2.5, width=16, parameters=4_000, steps=20),
        run("phase2", 0, 2.25, width=16, parameters=4_000, steps=20),
    ]
    other = [run("gla", 0, 1.0, corpus=7, width=32, parameters=9_000)]
    ((first, second),) = across.scaling([*large, *small, *other])
    assert first == (1_000, 320, {"gla": [3.0, 3.25]}) and first.flops == 6 * 1_000 * 320
    assert second == (4_000, 640, {"gla": [2.5], "phase2": [2.25]})
    assert ["4,000", "640", "1.5e+07", "2.5000", "2.2500"] in lines([*large, *small])
    assert across.scaling(other) == []


def test_differences_by_position_are_paired_by_seed():
    records = [
        run("gla", 0, 3.0),
        run("gla", 1, 4.0),
        run("phase2", 1, 4.5),
        run("phase2", 2, 9.0),
        run("mamba2", 0, None),
    ]
    table = lines(records, "gla")
    assert ["phase2", "+0.5000", "+0.5000"] in table and not any(line[:1] == ["mamba2"] for line in table)
    with pytest.raises(ValueError, match="no runs of 'mamba3'"):
        across.tables(records, "mamba3")


def test_parts_left_out_are_compared_for_each_model_within_one_setting():
    records = [
        *(run("phase2", seed, 3.0) for seed in (0, 1)),
        *(run("phase2/no-bk", seed, 3.5 + seed) for seed in (0, 1, 2)),
        run("phase2/hybrid/window-8", 0, 2.0),
        run("phase2/hybrid/window-8/no-bk", 0, 2.25),
        run("phase2/hybrid/window-8/bare", 0, 2.5),
        run("phase2/no-bk", 0, 9.0, steps=20),
        run("phase2", 0, 8.0, steps=20),
    ]
    table = lines(records)
    assert ["part", "phase2", "phase2/hybrid/window-8"] in table
    assert ["bk", "+1.0000", "±", "0.5000", "(2)", "+0.2500", "(1)"] in table
    assert ["bare", "-", "+0.5000", "(1)"] in table
    assert ["bk", "+1.0000", "(1)"] in table  # of the other setting


def test_places_of_attention_are_compared_with_none_and_with_all():
    records = [
        run("phase2/attention", 0, 2.0),
        *(run("phase2/at-2-4-6/window-512", seed, 2.5 + seed) for seed in (0, 1)),
        run("phase2/hybrid", 0, 2.75),
        run("phase2/at-4/window-512", 0, 2.875),
        run("phase2", 0, 3.0),
        run("phase2/hybrid/no-bk", 0, 1.0),
        run("gla/hybrid", 0, 1.0),
    ]
    found = across.places(records)
    assert list(found.values()) == [
        ((), math.inf),
        ((4,), 512),
        ((3, 6), 8),
        ((2, 4, 6), 512),
        ((1, 2, 3, 4, 5, 6), math.inf),
    ]
    table = lines(records)
    assert ["2,", "4,", "6", "512", "2", "2", "3.0000", "±", "0.5000", "-0.5000", "+0.5000", "+0.5000"] in table
    assert ["-", "-", "1", "2", "3.0000", "-", "+1.0000", "+1.0000"] in table
    assert ["1,", "2,", "3,", "4,", "5,", "6", "all", "1", "2", "2.0000", "-1.0000", "-", "-"] in table
    assert lines(records[:1] + records[5:6]) == [[]]  # one place


def test_report_prints_these_tables(tmp_path: Path):
    rows = [run("phase2/attention", 0, 3.0), run("phase2/attention/no-conv", 0, 3.5)]
    known = {
        "best_loss": 3.0,
        "bits_per_byte": 1.0,
        "parameters": 1_000,
        "state_bytes": 1_024,
        "tokens_per_second": 1.0,
    }
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row | known) + "\n" for row in rows))
    outcome = CliRunner().invoke(app, ["report", str(tmp_path / "runs.jsonl"), "--less", "phase2/attention"])
    assert outcome.exit_code == 0, outcome.output
    printed = " ".join(outcome.output.split())  # titles are wrapped to the width of their table
    assert "left out in training" in printed and "loss less that of phase2/attention by position" in printed
