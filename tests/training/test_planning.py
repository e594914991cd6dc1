"""Plans of runs and learning-rate range tests."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.training import TrainingConfig, find_learning_rate, lr_find, plan_run, train
from resolvent.training.lr_find import RangeTest
from resolvent.training.memory import Estimate
from resolvent.training.trainer import Trainer
from tests.processes import together

MakeConfig = Callable[..., TrainingConfig]


def test_plan_has_the_sizes_of_the_run(small_config: MakeConfig, tmp_path: Path):
    config = small_config(accumulation=3, ema=0.5)
    plan = plan_run(config, tokens_per_second=100.0)
    assert not (tmp_path / "run").exists()
    result = train(config)
    assert plan.parameters == result.model.num_parameters()
    assert plan.tokens == result.history.steps[-1].tokens
    assert plan.validated_tokens == 2 * sum(validation.tokens for validation in result.history.validations)
    assert plan.seconds == pytest.approx((plan.tokens + plan.validated_tokens / 3) / 100)
    assert plan.measured_memory is None


def test_plan_of_two_processes_counts_the_tokens_of_both(small_config: MakeConfig):
    config = small_config()
    tokens = together(2, planned_tokens, config)
    assert tokens == [2 * plan_run(config, tokens_per_second=1.0).tokens] * 2


def planned_tokens(config: TrainingConfig) -> int:
    return plan_run(config, tokens_per_second=1.0).tokens


def test_speed_is_that_of_the_timed_steps(small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def update(self: Trainer, factor: float) -> torch.Tensor:
        now[0] += 0.5
        return torch.ones(3)

    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr("resolvent.training.planning.time.perf_counter", lambda: now[0])
    assert plan_run(small_config()).tokens_per_second == 2 * 64 / 0.5


def test_plan_prints_as_one_line(small_config: MakeConfig):
    plan = dataclasses.replace(plan_run(small_config(), tokens_per_second=1000.0), memory=Estimate(2**30, 2**31))
    assert repr(plan) == f"RunPlan({plan.parameters:,} parameters, 1,280 tokens, 3.0 GiB, 0:02)"
    assert f"{plan.flops_per_token / 1e3:.1f} kFLOPs per token" in str(plan)
    assert "Memory    about 3.0 GiB: 1.0 GiB for parameters and optimiser, 2.0 GiB for activations; " in str(plan)


def test_range_test_ends_where_the_loss_rises(small_config: MakeConfig, tmp_path: Path):
    test = find_learning_rate(small_config(grad_clip=0.0))
    assert test.rates == sorted(test.rates) and len(test.rates) == len(test.losses)
    assert test.suggestion is not None and 1e-4 < test.suggestion < 0.1
    assert min(test.losses) < test.losses[0]
    assert not (tmp_path / "run").exists()
    assert len(test.table()) <= 16


def test_suggestion_is_where_the_loss_falls_fastest():
    rates = [10.0**-i for i in (5, 4, 3, 2, 1)]
    losses = [5.0, 4.9, 3.9, 3.5, 6.0]
    assert lr_find._suggestion(rates, losses) == rates[2]
    assert lr_find._suggestion(rates, [5.0, 6.0, 7.0, 8.0, 9.0]) is None
    after_the_rise = [5.0, 4.0, 5.2, 5.1, 4.5]
    assert lr_find._suggestion(rates, after_the_rise) == rates[0]
    assert RangeTest(rates, losses, rates[2], 5.0).advice.endswith("try --learning-rate 1.0e-03 --muon-lr 5.0e-03")
    assert repr(RangeTest(rates, losses, rates[2])) == "RangeTest(5 steps, suggestion 1.0e-03)"


def test_history_is_drawn(small_config: MakeConfig, tmp_path: Path):
    result = train(small_config(ema=0.5))
    result.plot(tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert "<svg" in text and os.path.getsize(tmp_path / "run.svg") > 5000
    with pytest.raises(ConfigError, match=r"run\.gif must end in \.png, \.pdf or \.svg"):
        result.plot(str(tmp_path / "run.gif"))
