"""The same seed gives the same bits: in another process, after a stop, and on CUDA where that is asked for."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.device import deterministic
from resolvent.models import load_model, save_model
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.interrupt import StopRequest
from resolvent.training.trainer import Trainer
from tests.models.small import PHASE1, PHASE2, SmallPhase, tokens
from tests.safety.victim import TEXT, fork, minute_config, start
from tests.training.runs import after_step

PHASES = pytest.mark.parametrize("phase", [PHASE1, PHASE2], ids=["phase1", "phase2"])
SAMPLING = [dict(temperature=0.0), dict(temperature=1.0), dict(temperature=0.8, top_k=20, top_p=0.9)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "verses.txt"
    path.write_text(TEXT)
    return path


def outcome(run: Path) -> dict[str, Any]:
    """Return all files of a run, byte for byte, except its speed."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        record.pop("tokens_per_second", None)
    return {**files, "metrics": metrics}


def test_training_in_another_process_gives_the_same_bits(text: Path, tmp_path: Path):
    train(minute_config(text, tmp_path / "here"))
    process = start(text, tmp_path / "there")
    process.join()
    assert process.exitcode == 0
    here = outcome(tmp_path / "here")
    assert len(here) > 4
    assert here == outcome(tmp_path / "there")


def test_another_seed_gives_other_bits(text: Path, tmp_path: Path):
    configs = [minute_config(text, tmp_path / name) for name in ("one", "other")]
    configs[1].seed = 1
    one, other = (train(config).validation.loss for config in configs)
    assert one != other


def write(directory: Path, options: dict[str, Any], device: str, out: Path) -> None:
    """Let a saved model write, and note the tokens."""
    model = load_model(directory, device=device)
    prompt = torch.arange(60).view(2, 30).to(device)
    random = torch.Generator().manual_seed(7)
    with deterministic(device == "cuda"):
        out.write_text(json.dumps(model.generate(prompt, 80, generator=random, **options).tolist()))


@PHASES
@pytest.mark.parametrize("options", SAMPLING)
def test_generation_in_another_process_gives_the_same_tokens(
    phase: SmallPhase, options: dict[str, Any], tmp_path: Path
):
    save_model(phase.model(), tmp_path / "model")
    write(tmp_path / "model", options, "cpu", tmp_path / "here.json")
    process = fork(write, tmp_path / "model", options, "cpu", tmp_path / "there.json")
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


@pytest.mark.gpu
@PHASES
@pytest.mark.parametrize("options", SAMPLING)
def test_generation_on_cuda_gives_the_same_tokens(phase: SmallPhase, options: dict[str, Any], tmp_path: Path):
    save_model(phase.model(), tmp_path / "model")
    for name in ("one", "other"):
        write(tmp_path / "model", options, "cuda", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def on_cuda(text: Path, out: Path, phase: SmallPhase, **options: Any) -> TrainingConfig:
    config = minute_config(text, out)
    config.model, config.phase = phase.model().config, 1 if phase is PHASE1 else 2
    config.model.dropout = 0.1
    config.device, config.deterministic = "cuda", True
    for name, value in options.items():
        setattr(config, name, value)
    return config


@pytest.mark.gpu
@PHASES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_cuda_gives_the_same_bits(
    phase: SmallPhase, precision: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Packed batches, with dropout: twice, and stopped and resumed."""
    for name in ("one", "other"):
        train(on_cuda(text, tmp_path / name, phase, precision=precision))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "other")
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(on_cuda(text, tmp_path / "parts", phase, precision=precision))
    resume(tmp_path / "parts")
    ours, theirs = outcome(tmp_path / "one"), outcome(tmp_path / "parts")
    assert ours["metrics"] == theirs["metrics"]
    assert ours["model.safetensors"] == theirs["model.safetensors"]


@pytest.mark.gpu
@PHASES
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_gradients_on_cuda_have_the_same_bits(phase: SmallPhase, backend: str):
    """Both back ends, on packed sequences long enough that sums are shared out between many programs."""
    model = phase.model(backend=backend).cuda()
    ids, offsets = tokens(20_000, 1).cuda(), torch.tensor([0, 5, 69, 9000, 9001, 20_000])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, cu_seqlens=offsets).backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    with deterministic():
        first = gradients()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_the_setting_ends_with_its_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_deterministic_run_uses_deterministic_algorithms(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []
    step: Callable[[Trainer, StopRequest], None] = Trainer._step

    def look(self: Trainer, stop: StopRequest) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(self, stop)

    monkeypatch.setattr(Trainer, "_step", look)
    config = minute_config(text, tmp_path / "run")
    config.deterministic = True
    train(config)
    assert seen == [True] * config.steps
    train(minute_config(text, tmp_path / "other"))
    assert seen[config.steps :] == [False] * config.steps
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")


def test_overlapping_blocks_keep_the_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first, second = deterministic(), deterministic()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # in the order in which they began: as threads may
    assert torch.are_deterministic_algorithms_enabled()
    second.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
