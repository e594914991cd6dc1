"""Whole runs of a model that is small enough to train in a second."""

import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from resolvent.data import Batch, encode_documents, load_tokenizer
from resolvent.data.tokenization import TOKENIZER_FILES, bytes_tokenizer
from resolvent.errors import CheckpointError, ConfigError, DataError
from resolvent.evaluation import evaluate_documents
from resolvent.models import load_model
from resolvent.models.base import Block
from resolvent.models.card import CARD
from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.runs import fixed_files
from resolvent.training import NonFiniteError, TrainingConfig, TrainingInterrupted, resume, train, train_step, trainer
from resolvent.training.compilation import Compilation
from resolvent.training.corpus import split_corpus
from resolvent.training.train_step import TrainStep
from resolvent.training.trainer import Trainer

from .runs import after_step, assert_same_run, metrics

MakeConfig = Callable[..., TrainingConfig]


def test_finished_run_has_a_model_card(small_config: MakeConfig, tmp_path: Path):
    config = small_config(steps=1)
    result = train(config)
    text = (tmp_path / "run" / CARD).read_text()
    assert "Trained for 1 step of 128 tokens with muon, seed 0." in text
    assert f"`{Path(str(config.data)).name}`" in text and str(Path(str(config.data)).parent) not in text
    score = result.validation
    assert f"| {score.loss:.4f} | {score.perplexity:,.3f} | {score.bits_per_byte:.4f} | {score.tokens:,} |" in text
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(config, overwrite=True)
    assert (tmp_path / "run" / CARD).read_text() == text
    (tmp_path / "run" / CARD).write_text("My own card.")
    train(config, overwrite=True)
    assert (tmp_path / "run" / CARD).read_text() == "My own card."


def test_run_folder_holds_model_tokenizer_and_metrics(small_config: MakeConfig, tmp_path: Path):
    config = small_config()
    result = train(config)
    run_dir = tmp_path / "run"
    assert result.run_dir == run_dir
    names = {path.name for path in run_dir.iterdir()}
    files = {"config.json", "model.safetensors", "tokenizer.json", "training.json", "metrics.jsonl", "manifest.json"}
    assert names == files | {
        "tokenizer_config.json",
        "generation_config.json",
        "result.json",
        "README.md",
        "checkpoints",
    }
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-00000008", "step-00000010"}
    loaded = load_model(run_dir, device="cpu")
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    record = json.loads((run_dir / "training.json").read_text())
    assert TrainingConfig.from_dict(record["training"]) == config
    assert not result.model.training


def test_repr_of_result_is_one_line():
    score = trainer.LanguageScore(1.23456, 3.4, 1.8, 100)
    result = trainer.TrainingResult(Path("runs/x"), nn.Identity(), bytes_tokenizer(), score)
    assert repr(result) == "TrainingResult('runs/x', validation loss 1.2346, 1.8000 bits per byte)"


def test_metrics_record_every_step_and_validation(small_config: MakeConfig, tmp_path: Path):
    config = small_config(accumulation=2)
    result = train(config)
    records = metrics(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert [record["tokens"] for record in steps] == [step * 2 * 2 * 64 for step in range(1, 11)]
    assert [(record["step"], record["final"]) for record in validations] == [
        (3, False),
        (6, False),
        (9, False),
        (10, True),
    ]
    held_out = split_corpus(config)[1]
    score = evaluate_documents(load_model(tmp_path / "run", device="cpu"), held_out, load_tokenizer(tmp_path / "run"))
    assert validations[-1]["validation_bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert validations[-1]["validation_tokens"] == score.tokens
    assert result.validation.loss == pytest.approx(score.loss, rel=1e-6)
    stream = encode_documents(split_corpus(config)[0], load_tokenizer(tmp_path / "run"))
    for record in steps:
        bits = record["loss"] / math.log(2) * stream.num_predictions / stream.num_bytes
        assert record["bits_per_byte"] == pytest.approx(bits)
        assert record["grad_norm"] > 0


def test_training_learns(small_config: MakeConfig):
    untrained = train(small_config(steps=1, learning_rate=1e-9)).validation
    config = small_config(steps=100, learning_rate=1e-2, out=small_config().out + "2", eval_interval=0)
    trained = train(config).validation
    assert untrained.bits_per_byte == pytest.approx(8, abs=0.3)
    assert trained.bits_per_byte < 3


def test_the_speed_is_tokens_over_seconds(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("resolvent.training.trainer.time.perf_counter", lambda: next(ticks) * 0.5)
    train(small_config(steps=3))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert speeds == [2 * 64 / 0.5] * 3


@pytest.mark.parametrize("stopped_after", [3, 4, 7])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_resumes_bit_for_bit(
    small_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_after: int,
    number: signal.Signals,
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small_config(out=str(whole), accumulation=2))
    after_step(monkeypatch, stopped_after, lambda: os.kill(os.getpid(), number))
    with pytest.raises(TrainingInterrupted) as stop:
        train(small_config(out=str(parts), accumulation=2))
    assert (stop.value.signal_number, stop.value.step) == (number, stopped_after)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    done = [record for record in metrics(whole) if record["step"] <= stopped_after]
    put_off = [record for record in done if record["step"] == 3 == stopped_after and "validation_loss" in record]
    assert metrics(parts) == [record for record in done if record not in put_off]
    resume(parts)
    assert_same_run(whole, parts, steps=10)


@pytest.mark.parametrize("killed_after", [2, 7])
def test_a_killed_run_resumes_bit_for_bit(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
):
    """After step 7 from the checkpoint of step 4, after step 2 from the beginning."""

    def kill() -> None:
        raise RuntimeError("killed")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small_config(out=str(whole)))
    after_step(monkeypatch, killed_after, kill)
    with pytest.raises(RuntimeError, match="killed"):
        train(small_config(out=str(parts)))
    assert metrics(parts)[-1]["step"] == killed_after
    resume(parts)
    assert_same_run(whole, parts, steps=10)


def test_a_run_resumes_from_another_working_directory(
    small_config: MakeConfig, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(text_file.parent)
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(data=text_file.name))
    monkeypatch.chdir(tmp_path)
    resume("run")
    assert metrics(tmp_path / "run")[-1]["final"]


def stop_after_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    after_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_a_run_of_several_texts_resumes(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.ndjson").write_text("".join(f'{{"body": "Verse {name} {n}."}}\n' * 5 for n in range(9)))
    monkeypatch.chdir(tmp_path)
    stop_after_step(monkeypatch, 3)
    with pytest.raises(TrainingInterrupted):
        train(small_config(data=["one.ndjson", "two.ndjson"], text_field="body"))
    monkeypatch.chdir("/")
    with pytest.raises(CheckpointError, match=r"one\.ndjson has changed"):
        resume(tmp_path / "run", data=str(tmp_path / "one.ndjson"))
    swapped = [str(tmp_path / f"{name}.ndjson") for name in ("two", "one")]
    with pytest.raises(CheckpointError, match=r"two\.ndjson, .*one\.ndjson has changed"):
        resume(tmp_path / "run", data=swapped)
    assert resume(tmp_path / "run", data=swapped[::-1]).history.steps[-1].step == 10


def test_folder_with_runs_inside_is_usable_as_data(
    small_config: MakeConfig, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(text_file, tmp_path / "verses.txt")
    monkeypatch.chdir(tmp_path)
    whole = train(small_config(data=".", out="runs/whole"))
    stop_after_step(monkeypatch, 3)
    with pytest.raises(TrainingInterrupted):
        train(small_config(data=".", out="runs/stopped"))
    assert resume("runs/stopped").validation == whole.validation, "a run's files are no text"


def test_changed_data_is_refused(
    small_config: MakeConfig, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "data.txt"
    data.write_text(text_file.read_text())
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(data=str(data)))
    data.write_text(text_file.read_text().replace("eldest", "oldest"))
    with pytest.raises(CheckpointError, match=r"data\.txt has changed since the run"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("file", ["trainer.json", "optimizer.safetensors", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(small_config: MakeConfig, tmp_path: Path, file: str):
    train(small_config(steps=1))
    (tmp_path / "run" / "checkpoints" / "step-00000001" / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=file):
        resume(tmp_path / "run")


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no training\.json"):
        resume(tmp_path)


def test_a_folder_in_use_is_refused_before_anything_is_read(small_config: MakeConfig, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty, and what it holds is no run: choose another one with --out"):
        train(small_config(data=str(tmp_path / "missing.txt")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "missing.txt"}, DataError, r"missing\.txt"),
        ({"seq_len": 100_000}, DataError, "seq_len"),
        ({"model": None, "preset": "huge"}, ConfigError, "Unknown preset: huge"),
        ({"steps": 0, "seed": -1}, ConfigError, "2 faults"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(
    small_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        train(small_config(**changes))
    assert not (tmp_path / "run").exists()


def test_only_the_newest_checkpoints_stay(small_config: MakeConfig, tmp_path: Path):
    train(small_config(checkpoint_interval=1, keep_checkpoints=3))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000009", "step-00000010"]


def test_a_loss_that_is_not_finite_stops_before_the_step(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forward, calls = Phase2IntegratedModel.forward, []

    def fail_in_step_5(self: Phase2IntegratedModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.training)
        return forward(self, *args, **kwargs) * (math.nan if sum(calls) == 5 else 1.0)

    monkeypatch.setattr(Phase2IntegratedModel, "forward", fail_in_step_5)
    with pytest.raises(NonFiniteError, match="step 5: the loss is nan"):
        train(small_config(eval_interval=0))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before: dict[str, Tensor] = {}

    def spoil_the_gradient(trainer: Trainer) -> None:
        trainer.raw_model.ln_f.bias.register_hook(lambda gradient: gradient * math.inf)
        before.update({name: weight.clone() for name, weight in trainer.raw_model.state_dict().items()})
        trainers.append(trainer)

    trainers: list[Trainer] = []
    introduce = Trainer._introduce
    monkeypatch.setattr(Trainer, "_introduce", lambda self: (introduce(self), spoil_the_gradient(self)))
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is 5\.\d+ and its gradient's norm (inf|nan)"):
        train(small_config())
    assert all(torch.equal(weight, before[name]) for name, weight in trainers[0].raw_model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_follow_the_schedule_with_a_clipped_gradient(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    seen: list[tuple[dict[str, float], float]] = []

    def look_before_steps(trainer: Trainer) -> None:
        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
            rates = {"muon_lr" if group.get("parts") else "lr": group["lr"] for group in optimizer.param_groups}
            seen.append((rates, torch.nn.utils.get_total_norm(gradients).item()))

        trainer.train_step.raw_optimizer.register_step_pre_hook(look)

    introduce = Trainer._introduce
    monkeypatch.setattr(Trainer, "_introduce", lambda self: (introduce(self), look_before_steps(self)))
    settings = dict(warmup_steps=2, schedule="wsd", min_lr_ratio=0.5, grad_clip=0.25)
    train(small_config(optimizer=optimizer, learning_rate=0.01, **settings))
    peaks = {"lr": 0.01, "muon_lr": 0.05} if optimizer == "muon" else {"lr": 0.01}
    records = [record for record in metrics(tmp_path / "run") if "loss" in record]
    assert [rates for rates, _ in seen] == [{name: record[name] for name in peaks} for record in records]
    factors = [0.5, *[1.0] * 7, 0.5 + 0.5 * (1 - 0.5**0.5), 0.5]
    for name, peak in peaks.items():
        assert [rates[name] for rates, _ in seen] == pytest.approx([peak * factor for factor in factors])
    assert all(record["grad_norm"] > 0.25 for record in records)
    assert [norm for _, norm in seen] == pytest.approx([0.25] * 10, rel=1e-3)


def test_the_loss_is_cross_entropy_of_the_logits(small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    model = small_config().model
    assert model is not None
    model.dropout = 0.0
    losses: list[tuple[float, float]] = []
    loss_of = TrainStep._loss

    def compare(step: TrainStep, batch: Batch) -> tuple[Tensor, Tensor | float]:
        loss, penalty = loss_of(step, batch)
        logits = step.raw_model(batch.input_ids, cu_seqlens=batch.cu_seqlens)
        losses.append((loss.item(), F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item()))
        return loss, penalty

    monkeypatch.setattr(TrainStep, "_loss", compare)
    train(small_config(model=model))
    assert len(losses) == 10
    assert [ours for ours, _ in losses] == pytest.approx([expected for _, expected in losses], rel=1e-6)


def test_accumulated_batches_are_one_large_batch(small_config: MakeConfig, tmp_path: Path):
    model = small_config().model
    assert model is not None
    model.dropout = 0.0
    gentle = dict(model=model, learning_rate=1e-4)  # AdamW turns the rounding of tiny gradients into whole steps
    train(small_config(**gentle, batch_size=4, out=str(tmp_path / "large")))
    train(small_config(**gentle, batch_size=1, accumulation=4, out=str(tmp_path / "parts")))
    for large, parts in zip(metrics(tmp_path / "large"), metrics(tmp_path / "parts"), strict=True):
        assert large == pytest.approx(parts, rel=1e-3)


def test_validations_and_checkpoints_do_not_change_training(small_config: MakeConfig, tmp_path: Path):
    train(small_config(out=str(tmp_path / "often"), eval_interval=1, checkpoint_interval=1))
    train(small_config(out=str(tmp_path / "never"), eval_interval=0, checkpoint_interval=0))
    often = [record for record in metrics(tmp_path / "often") if "loss" in record]
    never = [record for record in metrics(tmp_path / "never") if "loss" in record]
    assert often == never


def test_seed_decides_the_result(small_config: MakeConfig, tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(small_config(out=str(tmp_path / name), seed=seed))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "c")[0]["loss"]


def test_dropout_is_active_in_training_and_not_in_validation(small_config: MakeConfig, tmp_path: Path):
    model = small_config().model
    assert model is not None
    losses = {}
    for dropout in (0.0, 0.5):
        model.dropout = dropout
        train(small_config(model=model, out=str(tmp_path / str(dropout)), steps=1, learning_rate=1e-12))
        losses[dropout] = metrics(tmp_path / str(dropout))
    assert losses[0.0][0]["loss"] != losses[0.5][0]["loss"]
    assert losses[0.0][1]["validation_loss"] == pytest.approx(losses[0.5][1]["validation_loss"], rel=1e-6)


def test_bf16_computes_in_bf16_and_leaves_a_float32_model(small_config: MakeConfig, tmp_path: Path):
    train(small_config(out=str(tmp_path / "fp32")))
    result = train(small_config(out=str(tmp_path / "bf16"), precision="bf16"))
    exact, rounded = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    assert exact[0]["loss"] != rounded[0]["loss"]
    assert exact[0]["loss"] == pytest.approx(rounded[0]["loss"], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    ids = torch.arange(64)[None]
    assert torch.equal(result.model(ids), load_model(tmp_path / "bf16", device="cpu")(ids))


def test_the_tokenizer_decides_the_vocabulary(small_config: MakeConfig, tmp_path: Path):
    result = train(small_config(tokenizer="bpe", vocab_size=280))
    assert result.model.vocab_size == result.tokenizer.get_vocab_size() == 280
    assert small_config().model.vocab_size == 257  # the caller's is as it was


def test_plain_output_is_a_line_at_intervals(small_config: MakeConfig, tmp_path: Path):
    output = StringIO()
    train(small_config(log_interval=4), console=Console(file=output, width=60))
    lines = output.getvalue().splitlines()
    steps = [line.split()[1] for line in lines if "tokens/s" in line]
    assert steps == ["1/10", "4/10", "8/10", "10/10"]
    assert all(part in lines[6] for part in ("loss ", " bits/byte", " tokens/s", "lr ", "ETA "))
    validations = [line for line in lines if "validation: loss" in line]
    assert [line.split()[1] for line in validations] == ["3/10", "6/10", "9/10", "10/10"]
    assert "\x1b" not in output.getvalue()


def test_without_a_console_nothing_is_printed(small_config: MakeConfig, capfd: pytest.CaptureFixture[str]):
    train(small_config(steps=2))
    assert capfd.readouterr() == ("", "")


def test_activation_checkpointing_keeps_the_results(
    small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = train(small_config(steps=3, out=str(tmp_path / "plain"))).model
    checkpointed, calls = Block._gradient_checkpointing_func, []
    monkeypatch.setattr(
        Block, "_gradient_checkpointing_func", staticmethod(lambda *x: (calls.append(x), checkpointed(*x))[1])
    )
    anew = train(small_config(steps=3, recompute=True, out=str(tmp_path / "anew"))).model
    assert len(calls) == 3 * anew.n_layers
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), anew.parameters(), strict=True))


@pytest.mark.slow
def test_compiled_run_equals_an_eager_run(small_config: MakeConfig, tmp_path: Path):
    model = small_config().model
    assert model is not None
    model.dropout = 0.0  # whose random numbers are others in a compiled graph
    gentle = dict(model=model, learning_rate=1e-4, steps=3)
    eager = train(small_config(**gentle, out=str(tmp_path / "eager"))).validation
    compiled = train(small_config(**gentle, out=str(tmp_path / "compiled"), compile=True)).validation
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-5)


def test_padded_offsets_change_no_step(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All that is different but for CUDA: padded offsets, and gradients that are moved before others are added."""
    train(small_config(out=str(tmp_path / "plain"), accumulation=2))
    segments = []
    forward = Phase2IntegratedModel.forward

    def look(self: Phase2IntegratedModel, ids: Tensor, **options: Any) -> Any:
        if self.training:
            segments.append(len(options["cu_seqlens"]) - 1)
        return forward(self, ids, **options)

    monkeypatch.setattr(Phase2IntegratedModel, "forward", look)
    replayed = Compilation(False, padded=True, replayed=True)
    monkeypatch.setattr(train_step, "choose_compilation", lambda *_: replayed)
    train(small_config(out=str(tmp_path / "padded"), accumulation=2))
    assert len(segments) == 20
    assert set(segments) <= {2, 4, 8}
    for ours, theirs in zip(metrics(tmp_path / "padded"), metrics(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_manifest_lists_all_files_of_the_tokenizer():
    assert set(TOKENIZER_FILES) < set(fixed_files())


@pytest.mark.parametrize(("interval", "enabled", "said"), [(256, True, True), (64, True, True), (256, False, False)])
def test_warning_if_no_window_reaches_a_consolidation(small_config, caplog, interval: int, enabled: bool, said: bool):
    model = dataclasses.replace(
        small_config().model, consolidation_interval=interval, snr_enabled=enabled, resonance_enabled=enabled
    )
    train(small_config(model=model, steps=1, seq_len=64))
    assert any(f"consolidated every {interval} tokens" in message for message in caplog.messages) == said


@pytest.mark.parametrize(
    ("seq_len", "remedy"), [(64, "take a --seq-len of more than 256"), (65, "=64, or take a --seq")]
)
def test_the_remedy_reaches_a_consolidation(small_config, caplog, seq_len: int, remedy: str):
    model = dataclasses.replace(small_config().model, consolidation_interval=256)
    train(small_config(model=model, steps=1, seq_len=seq_len))
    assert any(remedy in message for message in caplog.messages)


def test_the_warning_names_the_filters_that_are_on(small_config, caplog):
    model = dataclasses.replace(small_config().model, consolidation_interval=64, snr_enabled=False)
    train(small_config(model=model, steps=1, seq_len=64))
    assert any("no step trains the resonance." in message for message in caplog.messages)


def test_n_seq_of_the_model_is_the_window_length(small_config, tmp_path: Path):
    model = small_config().model
    assert train(small_config(model=model, steps=1, seq_len=48)).model.n_seq == 48
    assert load_model(tmp_path / "run", device="cpu").n_seq == 48
    assert train(small_config(model=model, steps=1, seq_len=None, out=str(tmp_path / "own"))).model.n_seq == model.n_seq


def test_no_warning_if_windows_reach_a_consolidation(small_config, caplog):
    model = dataclasses.replace(small_config().model, consolidation_interval=64)
    train(small_config(model=model, steps=1, seq_len=65))
    assert not any("consolidated every" in message for message in caplog.messages)
