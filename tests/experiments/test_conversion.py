import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import conversion
from experiments.conversion import Model, Outcome, Plan, as_markdown, average, measure
from resolvent import Phase1Config, load_model
from resolvent.models.phase1 import Phase1IntegratedModel
from resolvent.training.run_folder import read_run

SMALL = Phase1Config(d_model=32, n_layers=2, n_seq=256, num_heads=2, ar_ssm_max_rank=6, htt_rank=5, dropout=0.0)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("conversion")
    text = "<|endoftext|>\n".join(f"Line {i}: {'so it goes, ' * (20 + i)}\n" for i in range(60))
    (folder / "text.txt").write_text(text)
    return Plan(SMALL, steps=3, out=folder / "runs", data=folder / "text.txt")


@pytest.fixture(scope="module")
def outcome(plan: Plan) -> Outcome:
    return measure(plan, seed=1)


def test_models_have_the_named_phase_and_tokens(plan: Plan, outcome: Outcome):
    assert outcome.converted.bits_per_byte == pytest.approx(outcome.phase1.bits_per_byte, abs=1e-3)
    tokens = {name: model["tokens"] for name, model in dataclasses.asdict(outcome).items()}
    once, twice = 3 * 8 * 256, 2 * 3 * 8 * 256
    continued = dict(phase1_continued=twice, converted_continued=twice)
    assert tokens == dict(phase1=once, converted=once, phase2=twice, **continued)
    folder = plan.out / "seed-1"
    for name in ("phase1", "phase1-continued", "converted", "converted-continued", "phase2"):
        model = load_model(folder / name, device="cpu")
        assert isinstance(model, Phase1IntegratedModel) == name.startswith("phase1")
        found = getattr(outcome, name.replace("-", "_"))
        assert (model.num_parameters(), model.d_model) == (found.parameters, 32)
    # Phase 1 and what it was converted to say the same, to the rounding of the processor.
    scores = [round(model.bits_per_byte, 5) for model in vars(outcome).values()]
    assert len(set(scores)) == 4 and all(0 < score < 8 for score in scores)


def test_continued_runs_share_batches_that_are_new(plan: Plan, outcome: Outcome):
    runs = [read_run(plan.out / "seed-1" / name)[0] for name in ("phase1", "phase1-continued", "converted-continued")]
    first, *continued = (dataclasses.replace(run, out=None, start_from=None) for run in runs)
    assert continued[0] == continued[1]
    assert continued[0].seed != first.seed
    assert all(getattr(continued[0], name) == getattr(first, name) for name in ("steps", "learning_rate", "schedule"))
    assert [Path(run.start_from).name for run in runs[1:]] == ["phase1", "converted"]


def test_finished_runs_are_not_repeated(plan: Plan, outcome: Outcome, monkeypatch: pytest.MonkeyPatch):
    for name in ("train", "resume"):
        monkeypatch.setattr(conversion, name, lambda *_, **__: pytest.fail("trained again"))
    assert measure(plan, seed=1) == outcome


def test_interrupted_runs_resume(plan: Plan, outcome: Outcome, monkeypatch: pytest.MonkeyPatch):
    metrics = plan.out / "seed-1" / "phase1-continued" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(conversion, "train", lambda *_, **__: pytest.fail("trained again"))
    assert measure(plan, seed=1) == outcome


def test_runs_of_another_plan_are_refused(plan: Plan, outcome: Outcome):
    with pytest.raises(conversion.typer.BadParameter, match="phase1 differs in steps: choose another folder"):
        measure(dataclasses.replace(plan, steps=4), seed=1)


def test_the_table_has_the_seeds_and_their_average():
    def outcome(*bits: float) -> Outcome:
        return Outcome(*(Model(value, 1000 + i, 2000) for i, value in enumerate(bits)))

    outcomes = {0: outcome(3, 3, 2.5, 2.25, 2), 1: outcome(4, 4.125, 3, 2, 2), 2: outcome(5, 5, 3.5, 3, 2)}
    lines = as_markdown(outcomes).splitlines()
    assert lines[3].split(" | ") == ["| seed 1", "4.0000", "4.1250", "3.0000", "2.0000", "2.0000 |"]
    error = statistics.stdev([2.25, 2, 3]) / 3**0.5
    assert lines[5].split(" | ")[4] == f"{(2.25 + 2 + 3) / 3:.4f} ± {error:.4f}" == average([2.25, 2, 3])
    assert "1,004 |" in lines[7]
    text = " ".join(lines[8:])
    assert "by 1.2e-01 at most" in text
    assert f"{average([-0.25, -1, -0.5], signed=True)} bits per byte from Phase 1 trained on" in text
    assert "-0.5833 ± 0.2205" in text and "+0.4167 ± 0.3005 from Phase 2" in text
    assert average([1.5]) == "1.5000"


def test_the_command_prints_the_table_and_writes_the_figures(tmp_path: Path, plan: Plan, monkeypatch):
    monkeypatch.setattr(conversion, "get_phase1_preset", lambda name: {"tiny": SMALL}[name])
    app = conversion.typer.Typer()
    app.command()(conversion.main)
    options = ["--seeds", "1", "--steps", "1", "--data", str(plan.data), "--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, [*options, "--json", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["steps"] == 1 and [seed["seed"] for seed in figures["seeds"]] == [0]
    assert f"| seed 0 | {figures['seeds'][0]['phase1']['bits_per_byte']:.4f} |" in result.output
