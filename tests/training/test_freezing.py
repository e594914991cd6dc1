"""Parameters that a run leaves as they are."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from resolvent.errors import ConfigError
from resolvent.models import load_model
from resolvent.tensors import read_tensors
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.freezing import freeze
from resolvent.training.planning import plan_run

from .runs import after_step, assert_same_run

MakeConfig = Callable[..., TrainingConfig]
FROZEN = ["blocks.*.ffn.*", "token_embedding.weight"]


def is_frozen(name: str) -> bool:
    return ".ffn." in name or name == "token_embedding.weight"


def test_frozen_parameters_stay_and_have_no_optimiser_state(small_config: MakeConfig, tmp_path: Path):
    train(small_config(out=str(tmp_path / "first"), steps=1))
    start = dict(start_from=str(tmp_path / "first"), preset="tiny", model=None)
    train(small_config(**start, out=str(tmp_path / "on"), freeze=FROZEN, ema=0.5))
    before, after = (load_model(tmp_path / name, device="cpu").state_dict() for name in ("first", "on"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(map(is_frozen, changed)) and {"blocks.0.hebbian.qkv_proj.weight", "ln_f.weight"} <= changed
    checkpoint = max((tmp_path / "on" / "checkpoints").iterdir())
    state = read_tensors(checkpoint / "optimizer.safetensors")
    assert state and not any(is_frozen(name.rpartition("/")[0]) for name in state)
    averaged = load_model(tmp_path / "on" / "ema", device="cpu").state_dict()
    assert all(torch.equal(averaged[name], before[name]) for name in before if is_frozen(name))


def test_a_resumed_run_keeps_them_frozen(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = train(small_config(out=str(tmp_path / "whole"), freeze=FROZEN, ema=0.5))
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(out=str(tmp_path / "stopped"), freeze=FROZEN, ema=0.5))
    result = resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", steps=10)
    assert result.model.num_parameters(trainable_only=True) == whole.model.num_parameters(trainable_only=True)


def test_a_plan_counts_them(small_config: MakeConfig):
    whole, part = (plan_run(small_config(freeze=names), tokens_per_second=1.0) for names in (None, ["blocks.*.ffn.*"]))
    frozen = whole.trained_parameters - part.trained_parameters
    assert frozen > 0 and part.parameters == whole.parameters == whole.trained_parameters
    assert f"({frozen:,} frozen)" in str(part) and "frozen" not in str(whole)
    assert whole.flops_per_token - part.flops_per_token == 2 * frozen
    assert whole.memory.parameters - part.memory.parameters == 8 * frozen  # Muon moves them: 12 bytes, or 4


def test_a_pattern_without_parameters_names_the_nearest(small_config: MakeConfig, tmp_path: Path):
    for pattern, nearest in (
        ("blocks.*.fnn.*", r"blocks\.\*\.ffn\.\*"),
        ("token_embeding.weight", "token_embedding.weight"),
    ):
        config = small_config(freeze=["ln_f.*", pattern], data=str(tmp_path / "nothing"))  # named before data are read
        with pytest.raises(ConfigError, match=f"freeze names no parameter .*{nearest}"):
            train(config)
    with pytest.raises(ConfigError, match=r"freeze leaves nothing to train: \* name all parameters"):
        train(small_config(freeze=["*"]))
    with pytest.raises(ConfigError, match="freeze must be a list of strings or None, got 'ln_f'"):
        dataclasses.replace(small_config(), freeze="ln_f").validate()
    assert not (tmp_path / "run").exists()


def test_both_names_of_a_tied_table_freeze_it():
    model = nn.Module()
    model.token_embedding, model.lm_head, model.ln_f = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.LayerNorm(3)
    model.lm_head.weight = model.token_embedding.weight
    freeze(model, ["lm_head.*"])
    assert not model.token_embedding.weight.requires_grad and model.ln_f.weight.requires_grad
