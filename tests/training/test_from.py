"""A run that starts from a saved model: its sizes, weights and tokenizer, and nothing else of its training."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resolvent.data import load_tokenizer, save_tokenizer
from resolvent.errors import CheckpointError, DataError
from resolvent.models import IntegratedModel, load_model, save_model
from resolvent.models.phase1 import Phase1Config
from resolvent.models.phase2 import Phase2IntegratedModel, convert_phase1_to_phase2
from resolvent.training import TrainingConfig, resume, train
from resolvent.training.run_folder import read_run
from resolvent.training.train_step import TrainStep

from .runs import after_step, assert_same_run, metrics

SIZES = dict(d_model=32, n_layers=2, n_seq=64, num_heads=2, ar_ssm_max_rank=12, htt_rank=5, dropout=0.1)
MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture(params=["phase 1", "phase 2", "converted"])
def saved(request: pytest.FixtureRequest, small_config: MakeConfig, tmp_path: Path) -> Path:
    """A model in its folder. Of Phase 1, most channels were never in use: the run ended early in its rank schedule."""
    folder = tmp_path / "saved"
    phase1 = dict(phase=1, model=Phase1Config(vocab_size=257, **SIZES)) if request.param != "phase 2" else {}
    run = dict(tokenizer="bpe", vocab_size=270, learning_rate=1e-2, eval_interval=0)
    if request.param != "converted":
        train(small_config(out=str(folder), **phase1, **run))
        return folder
    result = train(small_config(out=str(tmp_path / "source"), **phase1, **run))
    save_model(convert_phase1_to_phase2(result.model), folder)
    save_tokenizer(result.tokenizer, folder)
    return folder


@pytest.fixture
def from_saved(small_config: MakeConfig, saved: Path) -> MakeConfig:
    def make(**changes: object) -> TrainingConfig:
        return small_config(**{"start_from": str(saved), "preset": "tiny", "model": None, **changes})

    return make


def assert_equal_weights(ours: IntegratedModel, theirs: IntegratedModel) -> None:
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == yours.keys()
    for name in mine:
        assert torch.equal(mine[name], yours[name]), name


def test_run_from_a_saved_model_starts_with_its_weights(from_saved: MakeConfig, saved: Path, tmp_path: Path):
    source = load_model(saved, device="cpu")
    result = train(from_saved(learning_rate=1e-9, steps=1))
    assert type(result.model) is type(source)
    assert result.model.config == dataclasses.replace(source.config, n_seq=64)  # the run's windows
    assert result.tokenizer.to_str() == load_tokenizer(saved).to_str()
    ids = torch.randint(0, 270, (1, 100))
    torch.testing.assert_close(result.model(ids), source(ids), rtol=1e-4, atol=1e-4)

    poem = tmp_path / "poem.txt"  # long enough for a consolidation
    poem.write_text(Path(from_saved().data).read_text().replace("<|endoftext|>", "") * 20)
    result = train(from_saved(data=str(poem), steps=20, out=str(tmp_path / "on"), learning_rate=1e-2, seq_len=270))
    records = metrics(tmp_path / "on")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 21))
    assert records[-1]["validation_loss"] < metrics(tmp_path / "run")[-1]["validation_loss"] - 0.1
    before = dict(source.named_parameters())
    assert not [name for name, p in result.model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("stopped_after", [2, 7])
def test_run_from_a_saved_model_resumes_bit_for_bit_without_it(
    from_saved: MakeConfig, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
):
    """After step 7 from the checkpoint of step 4, after step 2 from the beginning."""

    def kill() -> None:
        raise RuntimeError("killed")

    train(from_saved(out=str(tmp_path / "whole")))
    after_step(monkeypatch, stopped_after, kill)
    with pytest.raises(RuntimeError, match="killed"):
        train(from_saved(out=str(tmp_path / "parts")))
    shutil.rmtree(saved)
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 10)


def test_training_json_names_the_saved_model(
    from_saved: MakeConfig, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(saved.parent)
    train(from_saved(start_from="saved", steps=1))
    assert read_run(tmp_path / "run")[0] == from_saved(start_from=str(saved), steps=1)


def test_run_starts_from_a_checkpoint(small_config: MakeConfig, tmp_path: Path):
    train(small_config(out=str(tmp_path / "old"), tokenizer="bpe", vocab_size=270))
    checkpoint = tmp_path / "old" / "checkpoints" / "step-00000008"
    config = small_config(start_from=str(checkpoint), preset="tiny", model=None, steps=1, checkpoint_interval=0)
    result = train(config)
    assert result.model.vocab_size == 270
    first = tmp_path / "run" / "checkpoints" / "step-00000000"
    assert_equal_weights(load_model(first, device="cpu"), load_model(checkpoint, device="cpu"))


def test_all_channels_of_a_saved_phase_1_model_are_in_use(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ranks = []
    step = TrainStep.gradient
    monkeypatch.setattr(TrainStep, "gradient", lambda self, *n: (ranks.append(self.raw_model.rank), step(self, *n))[1])
    model = Phase1Config(vocab_size=257, rank_warmup_steps=8, **SIZES)
    train(small_config(phase=1, model=model, out=str(tmp_path / "old"), steps=3))
    train(small_config(start_from=str(tmp_path / "old"), preset="tiny", model=None, steps=3))
    assert ranks == [4, 5, 6, 12, 12, 12]


def test_unusable_start_is_refused_before_data_are_read(small_config: MakeConfig, tmp_path: Path):
    def config(folder: str) -> TrainingConfig:
        return small_config(start_from=str(tmp_path / folder), preset="tiny", model=None, data="missing.txt")

    with pytest.raises(CheckpointError, match="nowhere holds no model"):
        train(config("nowhere"))
    train(small_config(out=str(tmp_path / "old"), steps=1))
    (tmp_path / "old" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        train(config("old"))
    assert not (tmp_path / "run").exists()


def test_frozen_weights_that_were_saved_train_again(small_config: MakeConfig, tmp_path: Path):
    run = dict(phase=1, model=Phase1Config(vocab_size=257, **SIZES), steps=1)
    result = train(small_config(out=str(tmp_path / "source"), **run))
    frozen = convert_phase1_to_phase2(result.model, freeze_phase1_weights=True)
    save_model(frozen, tmp_path / "saved")
    save_tokenizer(result.tokenizer, tmp_path / "saved")
    trained = train(small_config(start_from=str(tmp_path / "saved"), preset="tiny", model=None, steps=3)).model
    assert isinstance(trained, Phase2IntegratedModel)
    assert not torch.equal(trained.token_embedding.weight, frozen.token_embedding.weight)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == "resolvent_phase2"
