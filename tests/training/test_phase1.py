"""Phase 1 trains like Phase 2: it resumes bit for bit, and its schedule and penalty act."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.models import load_model
from resolvent.models.phase1 import Phase1Config, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2Config
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.run_folder import read_run
from resolvent.training.train_step import TrainStep

from .runs import assert_same_run

MODEL = Phase1Config(
    vocab_size=257, d_model=32, n_layers=2, n_seq=64, num_heads=2, dropout=0.1, ar_ssm_max_rank=12, rank_warmup_steps=8
)  # fmt: skip
MakeConfig = Callable[..., TrainingConfig]


def test_interrupted_run_equals_an_uninterrupted_one(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ranks = []
    step = TrainStep.gradient

    def observed(self, number, batches):
        ranks.append(self.raw_model.rank)
        if number == 6 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return step(self, number, batches)

    train(small_config(phase=1, model=MODEL, out=str(tmp_path / "whole")))
    monkeypatch.setattr(TrainStep, "gradient", observed)
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        train(small_config(phase=1, model=MODEL, out=str(tmp_path / "parts")))
    result = resume(tmp_path / "parts")
    assert ranks == [4, 5, 6, 7, 8, 9, 10, *(8, 9, 10, 11), 12, 12]
    assert isinstance(result.model, Phase1IntegratedModel)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 10)
    assert read_run(tmp_path / "parts")[0].model == MODEL
    loaded = load_model(tmp_path / "parts", device="cpu")
    ids = torch.randint(0, 257, (1, 50))
    torch.testing.assert_close(loaded(ids), result.model(ids))


def test_the_penalty_is_trained_on(small_config: MakeConfig, tmp_path: Path):
    def mean_gate(weight):
        model = Phase1Config.from_dict({**MODEL.to_dict(), "ar_ssm_l1_regularization": weight, "dropout": 0.0})
        result = train(small_config(phase=1, model=model, out=str(tmp_path / str(weight)), learning_rate=0.01))
        diagnostics = result.model(torch.randint(0, 257, (1, 50)), return_diagnostics=True)[1]
        return torch.stack(diagnostics["gate_values"]).mean()

    assert mean_gate(10.0) < mean_gate(0.0) - 0.02


def test_a_preset_of_phase_1_is_trained(small_config: MakeConfig, tmp_path: Path):
    config = small_config(phase=1, model=None, preset="tiny", steps=1)
    assert isinstance(train(config).model, Phase1IntegratedModel)
    assert str(TrainingConfig(phase=1).run_dir) == "runs/phase1-tiny"


def test_phase_and_model_belong_together():
    with pytest.raises(ConfigError, match="model is a Phase2Config, but phase is 1"):
        TrainingConfig(phase=1, preset=None, model=Phase2Config()).validate()
    with pytest.raises(ConfigError, match="phase must be <= 2, got 3"):
        TrainingConfig(phase=3).validate()
    with pytest.raises(ConfigError, match="phase must be 1 or 2, got 3"):
        TrainingConfig.from_dict({"phase": 3, "model": {}})
