"""Values that are not finite stop a run before a step, or cause a rewind."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.models import load_model
from resolvent.training import NonFiniteError, TrainingConfig, resume, train
from resolvent.training.checkpoint import find_checkpoint, load_trainer_state
from resolvent.training.trainer import Trainer

from .runs import after_step, assert_same_run, metrics, on_start, spoil_loss

MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture(autouse=True, params=[0, 1], ids=["reported at once", "reported a step later"])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A GPU goes on while a step's loss is on its way."""
    on_start(monkeypatch, lambda trainer: setattr(trainer, "lag", request.param))
    return request.param


def of_rewinds(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if "rewinds" in record]


@pytest.mark.parametrize("factor", [math.inf, math.nan, 1e38])
@pytest.mark.parametrize("name", ["blocks.0.hebbian.qkv_proj.weight", "ln_f.bias"])
def test_the_gradient_that_is_not_finite_is_named(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, factor: float
):
    """1e38 is finite itself, but not its norm."""
    hook = lambda gradient: gradient.sign() * factor  # noqa: E731
    on_start(monkeypatch, lambda trainer: trainer.raw_model.get_parameter(name).register_hook(hook))
    with pytest.raises(NonFiniteError, match=f"first of all the gradient of {name}; the step was not taken") as raised:
        train(small_config())
    assert (raised.value.step, raised.value.name) == (1, f"the gradient of {name}")


def test_first_nonfinite_gradient_of_the_backward_pass_is_named(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    def spoil(trainer: Trainer) -> None:
        for name in ("token_embedding.weight", "blocks.1.ffn.out_proj.weight", "blocks.0.ln1.weight"):
            trainer.raw_model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)

    on_start(monkeypatch, spoil)
    with pytest.raises(NonFiniteError) as raised:
        train(small_config())
    assert raised.value.name == "the gradient of blocks.1.ffn.out_proj.weight"


def test_rewind_halves_the_learning_rate(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    train(small_config(out=str(tmp_path / "undisturbed")))
    spoil_loss(monkeypatch, step=7, rewinds=1)
    train(small_config(rewinds=3))
    assert "Rewind 1 of 3, to step-00000004, with 0.5 of the learning rate: step 7: the loss is nan" in caplog.text
    found, expected = ([r for r in metrics(tmp_path / n) if "loss" in r] for n in ("run", "undisturbed"))
    assert [record["step"] for record in found] == list(range(1, 11))
    assert found[:4] == expected[:4]
    assert [r["lr"] for r in found[4:]] == pytest.approx([r["lr"] / 2 for r in expected[4:]])
    assert found[4]["loss"] == expected[4]["loss"]  # the same weights, data and dropout; the step after it differs
    assert found[5]["loss"] != expected[5]["loss"]
    record = dict(step=5, rewinds=1, failed_step=7, not_finite="the loss", lr_factor=0.5)
    assert of_rewinds(tmp_path / "run") == [record]
    assert load_trainer_state(tmp_path / "run" / "checkpoints" / "step-00000010").rewinds == 1


def test_a_run_without_a_checkpoint_goes_back_to_its_beginning(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(small_config(out=str(tmp_path / "undisturbed")))
    spoil_loss(monkeypatch, step=3, rewinds=2)
    train(small_config(rewinds=2))
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == list(range(1, 11))
    assert of_rewinds(tmp_path / "run")[-1]["lr_factor"] == 0.25
    assert metrics(tmp_path / "run")[1]["loss"] == metrics(tmp_path / "undisturbed")[0]["loss"]


@pytest.mark.parametrize(("killed_in_step", "rewinds"), [(5, 1), (6, 2), (9, 2)])
def test_a_run_that_went_back_resumes_bit_for_bit(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in_step: int, rewinds: int
):
    """Killed after the first rewind, and after the second, before a checkpoint and after."""
    spoil_loss(monkeypatch, step=7, rewinds=2)
    train(small_config(out=str(tmp_path / "whole"), rewinds=2))
    report = Trainer._report

    def report_or_die(self: Trainer, step: int, *values: float) -> None:
        report(self, step, *values)
        if (step, self.state.rewinds) == (killed_in_step, rewinds):
            raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "_report", report_or_die)
    with pytest.raises(RuntimeError, match="killed"):
        train(small_config(out=str(tmp_path / "parts"), rewinds=2))
    monkeypatch.setattr(Trainer, "_report", report)
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", steps=10)
    assert of_rewinds(tmp_path / "parts") == of_rewinds(tmp_path / "whole") != []


def test_run_stops_after_its_last_rewind(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoil_loss(monkeypatch, step=7, rewinds=100)
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is nan .* or more --rewinds than 2"):
        train(small_config(rewinds=2))
    assert of_rewinds(tmp_path / "run")[-1]["rewinds"] == 2
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoints" / "step-00000004", [])
    before = metrics(tmp_path / "run")
    with pytest.raises(NonFiniteError, match="step 7: the loss is nan"):
        resume(tmp_path / "run")
    assert metrics(tmp_path / "run") == before


@pytest.mark.parametrize("step", [6, 8])
def test_weights_that_are_not_finite_are_neither_validated_nor_saved(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    trainers: list[Trainer] = []
    on_start(monkeypatch, trainers.append)

    def spoil() -> None:
        with torch.no_grad():
            trainers[0].raw_model.ln_f.weight[3] = math.inf

    after_step(monkeypatch, step, spoil)
    with pytest.raises(NonFiniteError, match=rf"step {step}: the step left ln_f\.weight with values that are not"):
        train(small_config())
    assert find_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "step-00000004"
    assert load_model(tmp_path / "run", device="cpu").ln_f.weight.isfinite().all()


@pytest.mark.parametrize(
    ("learning_rate", "clip"), [(1e-30, 1.0), (1.0, 0.0), (1e3, 1.0), (1e3, 0.0), (1e10, 0.0), (1e30, 1.0)]
)
def test_no_learning_rate_leaves_a_run_that_is_not_finite(
    small_config: MakeConfig, tmp_path: Path, learning_rate: float, clip: float
):
    config = small_config(learning_rate=learning_rate, grad_clip=clip, steps=6, checkpoint_interval=1, warmup_steps=0)
    if learning_rate <= 1:
        train(config)
    else:
        with pytest.raises(NonFiniteError, match=re.escape(f"learning rate below {learning_rate:g},")):
            train(config)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(x) for x in json.loads(line).values())
    checkpoint, faults = find_checkpoint(tmp_path / "run")
    assert not faults
    if checkpoint is not None:
        assert all(x.isfinite().all() for x in load_model(checkpoint, device="cpu").parameters())
