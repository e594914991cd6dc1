"""Training by several processes on the CPU."""

import errno
import io
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from resolvent.data import Batch
from resolvent.errors import CheckpointError, ConfigError
from resolvent.models import load_model
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.tensors import read_tensors
from resolvent.training import (
    NonFiniteError,
    TrainingConfig,
    TrainingInterrupted,
    leaving_processes,
    memory,
    resume,
    train,
)
from resolvent.training.checkpoint import find_checkpoint
from resolvent.training.run_folder import has_begun
from resolvent.training.train_step import TrainStep
from resolvent.training.trainer import Trainer
from resolvent.training.validation import Validator
from tests.processes import Failed, together

from .runs import metrics

MakeConfig = Callable[..., TrainingConfig]
STEPS = 6
CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def run_here(config: TrainingConfig, rank: int = 0, die_at: int = 0) -> list[str]:
    """Begin a run or go on with it; the files and folders of its that this process touched, in order.

    Process ``rank`` kills itself when it is about to touch one for the time ``die_at``; 0 for never.
    """
    run, touched = str(config.run_dir), []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and run in str(arguments[0]):
            touched.append(str(arguments[0]))
            if len(touched) == die_at and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    resume(run) if has_begun(config.run_dir) else train(config)
    return touched


def go_on(run: Path) -> None:
    resume(run)


def weights(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "model.safetensors")


def assert_agree(ours: Path, theirs: Path) -> None:
    """The same but for the order of sums in float32."""
    mine, yours = metrics(ours), metrics(theirs)
    assert len(mine) == len(yours)
    for one, two in zip(mine, yours, strict=True):
        assert one.pop("not_finite", None) == two.pop("not_finite", None)
        assert one == pytest.approx(two, rel=1e-5)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, weights(theirs)[name], rtol=1e-4, atol=1e-5, msg=name)


def assert_same(ours: Path, theirs: Path) -> None:
    """The same, bit for bit."""
    assert metrics(ours) == metrics(theirs)
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, weights(theirs)[name]), name


def go_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run of which only one checkpoint is there."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name != f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> MakeConfig:
    """Runs whose steps have four batches, of whatever number of processes."""

    def config(name: str, processes: int, **changes: Any) -> TrainingConfig:
        model = Phase2Config(vocab_size=257, d_model=64, n_layers=2, n_seq=32, num_heads=1, head_dim=64, dropout=0.1)
        sizes: dict[str, Any] = dict(steps=STEPS, seq_len=32, batch_size=2, accumulation=4 // processes)
        reports: dict[str, Any] = dict(eval_interval=3, eval_tokens=300, final_eval_tokens=0, checkpoint_interval=2)
        reports["keep_checkpoints"] = 9
        out = str(tmp_path_factory.getbasetemp() / name)
        settings: dict[str, Any] = dict(preset=None, model=model, data=str(text_file), out=out, device="cpu")
        settings["learning_rate"] = 1e-4  # AdamW turns the rounding of tiny gradients into whole steps
        return TrainingConfig(**{**settings, **sizes, **reports, **changes})

    return config


@pytest.fixture(scope="module")
def alone(make: MakeConfig) -> Path:
    return train(make("alone", 1)).run_dir


@pytest.fixture(scope="module")
def touches(make: MakeConfig) -> list[list[str]]:
    """Return the file accesses of each of two processes that share a model."""
    return together(2, run_here, make("sharded", 2, parallel="fsdp"))


@pytest.fixture(scope="module")
def sharded(make: MakeConfig, touches: list[list[str]]) -> Path:
    """The run of these processes."""
    return make("sharded", 2).run_dir


def test_the_first_process_names_the_processes(make: MakeConfig):
    shown, silent = together(2, introduction, make("introduced", 2, steps=1))
    assert "fp32 on 2 processes (ddp), cpu\n" in shown
    assert silent == ""


def introduction(config: TrainingConfig) -> str:
    console = Console(file=io.StringIO(), width=200)
    train(config, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_two_processes_train_as_one(make: MakeConfig, alone: Path):
    config = make("shared", 2)
    together(2, run_here, config)
    assert_agree(config.run_dir, alone)


def test_two_processes_that_share_the_model_train_as_one(sharded: Path, alone: Path):
    assert_agree(sharded, alone)
    checkpoint, faults = find_checkpoint(sharded)
    assert checkpoint == sharded / "checkpoints" / f"step-{STEPS:08d}" and not faults
    shares = [sum(x.numel() for x in load_file(path).values()) for path in checkpoint.glob("shard-*")]
    theirs = alone / "checkpoints" / checkpoint.name
    files = [theirs / "model.safetensors", theirs / "optimizer.safetensors"]
    assert sum(shares) == sum(x.numel() for path in files for x in load_file(path).values())
    assert len(shares) == 2 and max(shares) < 0.51 * sum(shares)
    assert load_model(sharded, device="cpu").vocab_size == 257


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_adamw_alone(make: MakeConfig, parallel: str):
    alone = train(make("alone-adamw", 1, optimizer="adamw"), overwrite=True).run_dir
    config = make(f"{parallel}-adamw", 2, optimizer="adamw", parallel=parallel)
    together(2, run_here, config)
    assert_agree(config.run_dir, alone)


def test_a_shared_model_resumes_bit_for_bit(sharded: Path, tmp_path: Path):
    parts = go_back(sharded, tmp_path / "parts", step=2)
    together(2, go_on, parts)
    assert_same(parts, sharded)


def test_one_process_resumes_a_run_of_two(sharded: Path, tmp_path: Path):
    parts = go_back(sharded, tmp_path / "parts", step=4)
    resume(parts)
    assert_agree(parts, sharded)
    assert (parts / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors").exists()


def test_two_sharded_processes_resume_a_run_of_one(make: MakeConfig, alone: Path, tmp_path: Path):
    began = train(make("began", 1, parallel="fsdp")).run_dir
    assert_same(began, alone)
    parts = go_back(began, tmp_path / "parts", step=4)
    together(2, go_on, parts)
    assert_agree(parts, alone)
    assert len(list((parts / "checkpoints" / f"step-{STEPS:08d}").glob("shard-*"))) == 2


def leave(error: bool) -> tuple[bool, bool]:
    """Return True if there is a process group before the end of the block, and after it."""
    torch.distributed.init_process_group("gloo")
    try:
        with leaving_processes():
            before = torch.distributed.is_initialized()
            if error:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    return before, torch.distributed.is_initialized()


def test_processes_leave_their_group_at_the_end():
    assert together(2, leave, False) == [(True, False)] * 2
    assert together(2, leave, True) == [(True, True)] * 2  # of gloo: only NCCL holds threads and connections open


def final_loss(run: Path) -> float:
    return resume(run).validation.loss


def test_a_finished_run_is_finished_for_all(sharded: Path):
    before = {path: path.read_bytes() for path in sharded.rglob("*") if path.is_file()}
    loss = metrics(sharded)[-1]["validation_loss"]
    assert together(2, final_loss, sharded) == [loss, loss]
    assert before == {path: path.read_bytes() for path in sharded.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_four_processes_resume_a_run_of_two(sharded: Path, tmp_path: Path):
    parts = go_back(sharded, tmp_path / "parts", step=4)
    together(4, go_on, parts)
    assert_agree(parts, sharded)


def keep_no_weights(config: TrainingConfig) -> list[Any]:
    """Train without memory for whole weights between the passes; the calls that keep them."""
    memory._KEPT_WHOLE_PART = 0.0
    kept: list[Any] = []
    mark = FSDPModule.set_reshard_after_forward
    FSDPModule.set_reshard_after_forward = lambda *values: (kept.append(values), mark(*values))[1]
    train(config)
    return kept


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_averages_of_two_processes_are_those_of_one(make: MakeConfig, parallel: str):
    """Whole weights that a validation leaves are freed before the weights change places with their averages."""
    alone = train(make("alone-ema", 1, ema=0.5), overwrite=True).run_dir
    config = make(f"{parallel}-ema", 2, parallel=parallel, ema=0.5)
    together(2, run_here, config)
    assert_agree(config.run_dir, alone)


def test_weights_are_freed_between_the_passes_where_memory_is_short(make: MakeConfig, alone: Path):
    config = make("freed", 2, parallel="fsdp")
    assert together(2, keep_no_weights, config) == [[], []]
    assert_agree(config.run_dir, alone)


def test_batches_that_cannot_be_shared_evenly_are_refused(sharded: Path, tmp_path: Path):
    parts = go_back(sharded, tmp_path / "parts", step=4)
    with pytest.raises(Failed, match=r"a step of the run .* has 4 batches, which 3 processes cannot share evenly"):
        together(3, go_on, parts)


def test_a_damaged_shard_is_found(sharded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    parts = tmp_path / "parts"
    shutil.copytree(sharded, parts)
    last = parts / "checkpoints" / f"step-{STEPS:08d}"
    shard = sorted(last.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    checkpoint, faults = find_checkpoint(parts)
    assert checkpoint is not None and checkpoint.name == "step-00000004"
    assert shard.name in str(faults[0])
    shard.unlink()
    assert shard.name in str(find_checkpoint(parts)[1][0])


def die_and_go_on(config: TrainingConfig, rank: int, die_at: int) -> None:
    with pytest.raises(Failed):
        together(2, run_here, config, rank, die_at)
    if has_begun(config.run_dir):
        assert not find_checkpoint(config.run_dir)[1]
    together(2, run_here, config)


def test_killed_before_the_second_of_two_shards(make: MakeConfig, sharded: Path, touches: list[list[str]]):
    shard = ".step-00000004.partial/shard-00002"
    moment = next(number for number, path in enumerate(touches[1], 1) if shard in path)
    config = make("between", 2, parallel="fsdp")
    die_and_go_on(config, 1, moment)
    assert_same(config.run_dir, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_any_moment(make: MakeConfig, sharded: Path, touches: list[list[str]], rank: int):
    for moment in range(1, len(touches[rank]) + 1, 7):
        config = make(f"killed-{rank}-{moment}", 2, parallel="fsdp")
        die_and_go_on(config, rank, moment)
        assert_same(config.run_dir, sharded)


def fill_the_disk(config: TrainingConfig) -> str:
    """Train until the disk has no room for the second process's shard; what is said of it."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and ".step-00000004.partial/shard-00002" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)
    with pytest.raises(CheckpointError) as error:
        train(config)
    return str(error.value)


@pytest.mark.slow
def test_full_disk_of_one_process_stops_both(make: MakeConfig, sharded: Path):
    config = make("full", 2, parallel="fsdp")
    for message in together(2, fill_the_disk, config):
        assert "process 1: [Errno 28] No space left on device" in message
        assert "free space" in message
    names = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert names == ["step-00000000", "step-00000002"]
    together(2, go_on, config.run_dir)
    assert_same(config.run_dir, sharded)


def stop_last(config: TrainingConfig, lag: int) -> int:
    """Train until the last process is interrupted after step 1 and all of them stop; the step after which they do."""
    report, introduce = Trainer._report, Trainer._introduce

    def interrupted(self: Trainer, step: int, *values: float) -> None:
        report(self, step, *values)
        if step == 1 and self.accelerator.process_index == self.accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGINT)

    def lagging(self: Trainer) -> None:
        introduce(self)
        self.lag = lag

    Trainer._report, Trainer._introduce = interrupted, lagging
    try:
        train(config)
    except TrainingInterrupted as stop:
        return stop.step
    finally:
        Trainer._report, Trainer._introduce = report, introduce
    return config.steps


@pytest.mark.parametrize("lag", [0, 1])
def test_processes_stop_together_and_resume(make: MakeConfig, alone: Path, tmp_path: Path, lag: int):
    config = make(f"stopped-{lag}", 2)
    assert together(2, stop_last, config, lag) == [2 + lag] * 2
    assert find_checkpoint(config.run_dir)[0] == config.run_dir / "checkpoints" / f"step-{2 + lag:08d}"
    together(2, go_on, config.run_dir)
    assert_agree(config.run_dir, alone)


def stop_last_in_validation(config: TrainingConfig) -> tuple[int, int]:
    """Train until the last process is interrupted in a validation; the step of all, and this one's calls in it."""
    forward, read, calls = Phase2IntegratedModel.forward, Validator._nats_of_share, [0]

    def counted(self: Phase2IntegratedModel, *arguments: Any, **options: Any) -> Any:
        calls[0] += not self.training and "labels" in options
        return forward(self, *arguments, **options)

    def interrupted(self: Validator, *arguments: Any) -> Tensor:
        if self.accelerator.process_index == self.accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, *arguments)

    Phase2IntegratedModel.forward, Validator._nats_of_share = counted, interrupted
    try:
        train(config)
    except TrainingInterrupted as stop:
        return stop.step, calls[0]
    finally:
        Phase2IntegratedModel.forward, Validator._nats_of_share = forward, read
    return config.steps, calls[0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_stop_a_validation_together(make: MakeConfig, text_file: Path, tmp_path: Path, parallel: str):
    """Also if one of them has nothing to read: the held-out text is one document."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text(encoding="utf-8").replace("<|endoftext|>", "") * 6, encoding="utf-8")
    changes = dict(data=str(text), eval_tokens=0)
    alone = train(make(f"validation-alone-{parallel}", 1, **changes)).run_dir
    assert metrics(alone)[-1]["validation_tokens"] > 3 * 512  # which takes four calls
    config = make(f"validation-{parallel}", 2, parallel=parallel, **changes)
    assert together(2, stop_last_in_validation, config) == [(3, 1), (3, 0)]
    together(2, go_on, config.run_dir)
    assert_agree(config.run_dir, alone)


def fail_once(config: TrainingConfig) -> list[str]:
    """Train, but for a gradient that is infinite in step 5 of the last process, and a weight after step 2 in all."""
    loss_of, report, faults = TrainStep._loss, Trainer._report, []
    introduce, rewind = Trainer._introduce, Trainer._rewind
    trainers: list[Trainer] = []

    def noticed(self: Trainer) -> None:
        introduce(self)
        trainers.append(self)

    def spoilt_loss(self: TrainStep, batch: Batch) -> tuple[Tensor, Tensor | float]:
        loss, penalty = loss_of(self, batch)
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        state = trainers[-1].state
        return loss * (math.inf if last and (state.step, state.rewinds) == (4, 1) else 1.0), penalty

    def spoilt_weight(self: Trainer, *values: float) -> None:
        report(self, *values)
        if (self.state.step, self.state.rewinds) == (2, 0):
            with torch.no_grad():
                self.raw_model.ln_f.weight.mul_(math.nan)

    def noted(self: Trainer, fault: NonFiniteError) -> None:
        faults.append(fault.name)
        rewind(self, fault)

    TrainStep._loss = spoilt_loss
    Trainer._introduce, Trainer._report, Trainer._rewind = noticed, spoilt_weight, noted
    try:
        train(config)
    finally:
        TrainStep._loss = loss_of
        Trainer._introduce, Trainer._report, Trainer._rewind = introduce, report, rewind
    return faults


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_go_back_together(make: MakeConfig, tmp_path: Path, parallel: str):
    alone = make("back-alone", 1, out=str(tmp_path / "alone"), rewinds=2)
    config = make(f"back-{parallel}", 2, parallel=parallel, rewinds=2)
    assert fail_once(alone) == ["ln_f.weight", "the loss"]
    assert together(2, fail_once, config) == [["ln_f.weight", "the loss"]] * 2
    assert_agree(config.run_dir, alone.run_dir)


def test_fsdp_of_accelerate_is_refused(make: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="configured for FSDP: use --parallel fsdp"):
        train(make("refused", 1))
