"""Values that trackers get, and runs that tracking does not change."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resolvent.errors import CheckpointError, ConfigError
from resolvent.models.phase1 import Phase1Config
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.diagnostics import gradient_norms, read_diagnostics
from resolvent.training.tracking import tracker_options
from resolvent.training.trainer import Trainer
from tests.models.small import HYBRID, PHASE1, PHASE2, tokens

from .runs import after_step, assert_same_run, metrics, on_start, spoil_loss

MakeConfig = Callable[..., TrainingConfig]


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    return found.Reload()


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar but for how fast the run was, with its steps."""
    found = events(run_dir)
    names = [name for name in found.Tags()["scalars"] if not name.endswith("tokens_per_second")]
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}


@pytest.fixture
def tracked(small_config: MakeConfig) -> MakeConfig:
    return lambda **changes: small_config(tracker="tensorboard", **changes)


def test_tensorboard_gets_metrics_and_diagnostics(tracked: MakeConfig):
    config = tracked()
    train(config)
    found, steps = scalars(config.run_dir), list(range(1, config.steps + 1))
    for name in ("loss", "bits_per_byte", "lr", "muon_lr", "grad_norm", "tokens"):
        written = [record[name] for record in metrics(config.run_dir) if "loss" in record]
        assert [step for step, _ in found[f"training/{name}"]] == steps
        assert [value for _, value in found[f"training/{name}"]] == pytest.approx(written, rel=1e-6)
    checked = [3, 6, 9, 10]
    validated = [record["validation_loss"] for record in metrics(config.run_dir) if "validation_loss" in record]
    assert found["validation/loss"] == [
        (s, pytest.approx(v, rel=1e-6)) for s, v in zip(checked, validated, strict=True)
    ]
    quantities = ("gamma_mean", "energy", "energy_over_bound", "signal_share", "snr_strength", "resonant_share")
    for quantity in (*quantities, "gradient_norm"):
        for layer in ("layer_01", "layer_02"):
            assert [step for step, _ in found[f"{quantity}/{layer}"]] == checked
    histograms = events(config.run_dir).Tags()["histograms"]
    assert set(histograms) == {f"{q}/layer_0{n}" for q in ("gamma", "snr", "mode_energy") for n in (1, 2)}


def test_gradient_norms_of_layers_add_up_to_the_total(tracked: MakeConfig):
    config = tracked()
    train(config)
    found = scalars(config.run_dir)
    parts = [dict(values) for name, values in found.items() if name.startswith("gradient_norm/")]
    for step, whole in found["training/grad_norm"]:
        if step in (3, 6, 9, 10):
            assert sum(part[step] ** 2 for part in parts) ** 0.5 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("phase", [1, 2])
def test_tracking_changes_no_bit_of_a_run(small_config: MakeConfig, tmp_path: Path, phase: int):
    sizes: dict[str, Any] = dict(d_model=32, n_layers=2, num_heads=2, dropout=0.1, ar_ssm_max_rank=4)
    model = {"model": Phase1Config(vocab_size=257, n_seq=64, **sizes), "phase": 1} if phase == 1 else {}
    for tracker in ("none", "tensorboard"):
        train(small_config(out=str(tmp_path / tracker), tracker=tracker, **model))
    assert_same_run(tmp_path / "tensorboard", tmp_path / "none", 10)
    assert not (tmp_path / "none" / "tensorboard").exists()
    assert scalars(tmp_path / "tensorboard")["validation/loss"]


def test_resumed_run_continues_its_tracker_entry(tracked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, broken = tracked(out=str(tmp_path / "whole")), tracked(out=str(tmp_path / "broken"))
    train(whole)
    save = Trainer._save
    with monkeypatch.context() as patch:  # as if it had been killed at step 7: the last three steps are tracked twice
        patch.setattr(Trainer, "_save", lambda self: save(self) if self.state.step == 4 else None)
        after_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(TrainingInterrupted):
            train(broken)
    assert scalars(broken.run_dir)["training/loss"][-1][0] == 7
    resume(broken.run_dir)
    assert_same_run(broken.run_dir, whole.run_dir, 10)
    assert scalars(broken.run_dir) == scalars(whole.run_dir)


@pytest.fixture(params=[0, 1], ids=["reported at once", "reported a step later"])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A GPU goes on while a step's loss is on its way."""
    on_start(monkeypatch, lambda trainer: setattr(trainer, "lag", request.param))
    return request.param


@pytest.mark.parametrize("step", [6, 7, 9])
def test_tensorboard_shows_the_steps_that_a_run_took_again(
    tracked: MakeConfig, monkeypatch: pytest.MonkeyPatch, lag: int, step: int
):
    """Back from step 6 or 7 to 4, from 9 to 8, and that twice."""
    config = tracked(rewinds=2)
    spoil_loss(monkeypatch, step=step, rewinds=2)
    train(config)
    found, first = scalars(config.run_dir), 5 if step < 8 else 9
    for name in ("loss", "lr", "muon_lr"):
        written = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in metrics(config.run_dir) if "loss" in r]
        assert found[f"training/{name}"] == written
    assert found["training/rewinds"] == [(first, 2.0)]
    for name in ("validation/loss", "gamma_mean/layer_01", "gradient_norm/layer_01"):
        assert [step for step, _ in found[name]] == [3, 6, 9, 10]


def test_resume_may_add_a_tracker(small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    config = small_config()
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(TrainingInterrupted):
            train(config)
    resume(config.run_dir, tracker="tensorboard")
    assert [step for step, _ in scalars(config.run_dir)["training/loss"]] == [6, 7, 8, 9, 10]


def test_missing_tracker_is_named_before_the_run_begins(small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resolvent.training.tracking.get_available_trackers", list)
    config = small_config(tracker="comet_ml")
    with pytest.raises(ConfigError, match="comet_ml is not installed: pip install comet-ml"):
        train(config)
    assert not config.run_dir.exists()
    with pytest.raises(ConfigError, match=r"pip install 'resolvent\[tensorboard\]'"):
        tracker_options(small_config(tracker="tensorboard"))


class Notes(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, tracker = "mlflow", False, None
    told: ClassVar[list[tuple[int, dict[str, Any]]]] = []
    options: ClassVar[list[dict[str, Any]]] = []
    finished: ClassVar[list[str]] = []

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.options.append(options)

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.options.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished.append(self.run_name)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> type[Notes]:
    """Notes in the place of MLflow and Weights & Biases."""
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Notes)
    available = [LoggerType("mlflow"), LoggerType("wandb")]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", available)
    for kept in (Notes.told, Notes.options, Notes.finished):
        kept.clear()
    return Notes


def test_any_tracker_of_accelerate_gets_scalars_and_settings(small_config: MakeConfig, notes: type[Notes]):
    train(small_config(tracker="mlflow", steps=4))
    names = {name for _, values in notes.told for name in values}
    assert {"training/loss", "validation/loss", "gamma_mean/layer_02", "gradient_norm/lm_head"} <= names
    assert all(isinstance(value, float | int) for _, values in notes.told for value in values.values())
    assert [step for step, _ in notes.told] == sorted(step for step, _ in notes.told)
    created, settings = notes.options
    assert created == {} and settings["model.d_model"] == 64 and settings["seed"] == 0
    assert notes.finished == ["resolvent"]


def told(name: str) -> list[tuple[int, float]]:
    return [(step, values[name]) for step, values in Notes.told if name in values]


@pytest.mark.parametrize("interval", [3, 4])
def test_other_trackers_skip_steps_logged_before(
    small_config: MakeConfig, notes: type[Notes], monkeypatch: pytest.MonkeyPatch, lag: int, interval: int
):
    """Back from step 8, to 6 or to 4: the last step that they know is the seventh."""
    spoil_loss(monkeypatch, step=8, rewinds=1)
    config = small_config(tracker="mlflow", rewinds=1, checkpoint_interval=interval)
    train(config)
    steps = [step for step, _ in notes.told]
    assert steps == sorted(steps)
    assert [step for step, _ in told("training/loss")] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10]
    assert [step for step, _ in told("validation/loss")] == [3, 6, 9, 10]
    assert told("training/rewinds") == [(7, 1)]
    taken_again = [(r["step"], r["lr"]) for r in metrics(config.run_dir) if "loss" in r and r["step"] >= 7]
    assert told("training/lr")[-4:] == taken_again


def test_rewind_from_the_last_step_keeps_the_validation(
    small_config: MakeConfig, notes: type[Notes], monkeypatch: pytest.MonkeyPatch, lag: int
):
    spoil_loss(monkeypatch, step=10, rewinds=1)
    config = small_config(tracker="mlflow", rewinds=1)
    train(config)
    (last,) = (r for r in metrics(config.run_dir) if r.get("final"))
    assert told("validation/loss")[-1] == (10, last["validation_loss"])
    assert told("training/rewinds") == [(10, 1)]


def test_a_tracker_is_closed_when_a_run_is_interrupted(
    small_config: MakeConfig, notes: type[Notes], monkeypatch: pytest.MonkeyPatch
):
    after_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(tracker="mlflow"))
    assert notes.finished == ["resolvent"]


def test_weights_and_biases_continues_a_resumed_run(
    small_config: MakeConfig, notes: type[Notes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=list))
    config = small_config(tracker="wandb", eval_interval=0)
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(TrainingInterrupted):
            train(config)
    resume(config.run_dir)
    first, _, second, _ = notes.options
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 32
    assert len(dict(notes.told[-1][1])["gamma/layer_01"]) > 100
    (config.run_dir / "tracker.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tracker\.json holds no id: remove it"):
        resume(config.run_dir, steps=12)


@pytest.mark.parametrize("phase", [PHASE1, PHASE2, HYBRID], ids=["phase 1", "phase 2", "hybrid"])
def test_diagnostics_change_no_state(phase: Any):
    model, ids = phase.model().train(), tokens(80, 1)[0]
    before, generator = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    diagnostics = read_diagnostics(model, ids)
    assert model.training and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again = read_diagnostics(model, ids)
    assert again.scalars == diagnostics.scalars and len(diagnostics.scalars) >= 3 * 3
    assert all(torch.equal(again.histograms[name], values) for name, values in diagnostics.histograms.items())


def test_the_energy_stays_below_its_bound():
    diagnostics = read_diagnostics(PHASE2.model(), tokens(200, 1)[0])
    shares = [value for name, value in diagnostics.scalars.items() if name.startswith("energy_over_bound")]
    assert len(shares) == 3 and all(0 < share < 1 for share in shares)


def test_an_attending_layer_has_a_decay_and_no_energy():
    names = read_diagnostics(HYBRID.model(), tokens(80, 1)[0]).scalars.keys()
    assert {name for name in names if name.startswith("energy/")} == {"energy/layer_01", "energy/layer_03"}
    assert "gamma_mean/layer_02" in names


def test_gradients_are_grouped_by_layer():
    model = PHASE2.model()
    model(tokens(20), labels=tokens(20)).backward()
    norms = gradient_norms(model)
    layers = {f"gradient_norm/layer_0{n}" for n in (1, 2, 3)}
    outside = ("token_embedding", "position_embedding", "ln_f", "lm_head")
    assert norms.keys() == layers | {f"gradient_norm/{name}" for name in outside}
    squares = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(float(squares), rel=1e-5)
