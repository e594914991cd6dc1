"""Compilation in training: when, what, and what its errors say."""

import dataclasses
from collections.abc import Callable
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from resolvent.errors import ConfigError
from resolvent.models.phase1 import Phase1Config
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.training import TrainingConfig, compilation, find_learning_rate, lr_find, train, train_step
from resolvent.training.compilation import (
    Compilation,
    choose_compilation,
    compile_blocks,
    remove_compiled_blocks,
    without_compiled_blocks,
)
from resolvent.training.lora import LoraOptions, add_adapters
from resolvent.training.progress import TrainingDisplay
from resolvent.training.train_step import TrainStep

MakeConfig = Callable[..., TrainingConfig]
OFF, REPLAYED = Compilation(False), Compilation(True, padded=True, replayed=True)


def choice(device: str, processes: int = 1, reads: bool = False, phase: int = 2, **changes: Any) -> Compilation:
    model: Any = SimpleNamespace(reads_offsets=reads, config=Phase1Config() if phase == 1 else Phase2Config())
    return choose_compilation(TrainingConfig(**changes), torch.device(device), processes, model)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton and its C compiler found."""
    monkeypatch.setattr(compilation, "find_spec", lambda _: object())
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("expected", "device", "changes"),
    [
        (REPLAYED, "cuda", dict(steps=1000)),
        (REPLAYED, "cuda", dict(steps=500, accumulation=2)),
        (OFF, "cuda", dict(steps=999)),
        (OFF, "cpu", dict(steps=10**6)),
        (REPLAYED, "cuda", dict(steps=1, compile=True)),
        (REPLAYED, "cuda", dict(steps=1000, parallel="fsdp")),
        (OFF, "cuda", dict(steps=1000, compile=False)),
        (OFF, "cuda", dict(steps=1000, processes=2)),
        (Compilation(True, padded=True), "cuda", dict(steps=1, processes=2, compile=True)),
        (Compilation(True, padded=True), "cuda", dict(steps=1, processes=2, compile=True, parallel="fsdp")),
        (Compilation(True), "cpu", dict(compile=True)),
        (Compilation(True), "cuda", dict(compile=True, reads=True)),
    ],
)
@pytest.mark.usefixtures("triton")
def test_long_runs_of_one_process_on_cuda_are_compiled(expected: Compilation, device: str, changes: dict[str, Any]):
    assert choice(device, **changes) == expected


@pytest.mark.parametrize(("changes", "obstacle"), [(dict(reads=True), "reads the offsets"), (dict(phase=1), "rank")])
@pytest.mark.usefixtures("triton")
def test_models_that_do_not_compile_as_one_piece_are_not_compiled_by_default(changes: dict[str, Any], obstacle: str):
    found = choice("cuda", **changes)
    assert not found.wanted
    assert obstacle in found.obstacle


@pytest.mark.usefixtures("triton")
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert choice("cuda") == Compilation(False, obstacle="Triton finds no C compiler (gcc or clang)")
    monkeypatch.setenv("CC", "icx")
    assert choice("cuda").obstacle == "Triton finds no C compiler (CC=icx)"
    monkeypatch.setattr(compilation, "find_spec", lambda _: None)
    assert choice("cuda").obstacle == "Triton is not installed"
    assert choice("cuda", steps=5) == OFF  # where it is not missed


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Compilation(True), "Compiling the model; the first step takes a minute or two (not with --no-compile)"),
        (Compilation(False, obstacle="Triton is not installed"), "Not compiled, since Triton is not installed"),
        (OFF, ""),
    ],
)
def test_the_output_says_that_a_model_is_compiled(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, found: Compilation, said: str
):
    monkeypatch.setattr(train_step, "choose_compilation", lambda *_: found)
    monkeypatch.setattr(TrainStep, "_compile", lambda _: None)
    output = StringIO()
    train(small_config(steps=1), console=Console(file=output, width=200))
    lines = [line for line in output.getvalue().splitlines() if "ompil" in line]
    assert lines == ([said] if said else [])


def test_an_error_of_the_compiler_names_the_remedy(small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no C++ compiler\nat all")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r"cannot compile the model \(.*no C\+\+ compiler\): train with --no-compile"):
        train(small_config(steps=1, compile=True))
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have torch.compile only list the shapes that compiled blocks are called with."""
    calls: list[tuple[int, ...]] = []

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return lambda x, *rest: (calls.append(tuple(x.shape)), function(x, *rest))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


def test_compiled_blocks_can_be_put_aside(counted: list[tuple[int, ...]]):
    model = Phase2IntegratedModel(Phase2Config(vocab_size=8, d_model=16, n_layers=2, num_heads=1, head_dim=16)).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids)
    compile_blocks(model)
    assert torch.equal(model(ids), expected)
    assert counted == [(1, 3, 16)] * 2
    with without_compiled_blocks(model):
        model(ids)
    assert len(counted) == 2
    model(ids)
    assert len(counted) == 4
    remove_compiled_blocks(model)
    model(ids)
    assert len(counted) == 4


@pytest.mark.parametrize(("changes", "adapted", "graphs"), [({}, False, 2), (dict(attention_layers=(2, 5)), True, 3)])
def test_blocks_share_compiled_code(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], adapted: bool, graphs: int
):
    """The first block has no block before it to read from; all others of a kind are one piece of code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compilation, "obstacle_in_model", lambda _: "")  # documents alone cut the code on the CPU
    config = Phase2Config(vocab_size=8, d_model=16, n_layers=6, n_seq=16, num_heads=1, head_dim=16, **changes)
    model = Phase2IntegratedModel(config)
    if adapted:
        add_adapters(model, LoraOptions.parse("r=2,dropout=0.1"))
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model.train())
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[2, 3, 4]])).backward()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_blocks_are_compiled_in_training_alone(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, counted: list[tuple[int, ...]]
):
    """Validations in between and at the end, with texts of other lengths, and the trained model run without."""
    monkeypatch.setattr(train_step, "choose_compilation", lambda *_: Compilation(True))
    monkeypatch.setattr(TrainStep, "_compile", lambda self: compile_blocks(self.raw_model))
    model = train(small_config(steps=6, ema=0.9)).model
    model(torch.tensor([[1, 2, 3]]))
    assert counted == [(1, 128, 64)] * 6 * model.n_layers


def test_the_time_to_compile_is_not_shown_as_speed():
    output = StringIO()
    display = TrainingDisplay(Console(file=output, width=200), steps=9, first_step=0, log_interval=1, warm_up=2)
    for step, seconds in enumerate([60.0, 9.0, 0.5, 0.1, 0.5], 1):
        display.step(step, loss=2.0, bits_per_byte=2.5, learning_rate=0.1, tokens=500, seconds=seconds)
    first, second, *others = output.getvalue().splitlines()
    assert "tokens/s" not in first + second and "ETA" not in first + second
    assert [line.split("bits/byte  ")[1] for line in (others[0], others[2])] == [
        "1,000 tokens/s  lr 1.0e-01  ETA 0:03",
        "1,000 tokens/s  lr 1.0e-01  ETA 0:02",
    ]


def test_learning_rates_are_tried_without_compilation_by_default(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def look(config: TrainingConfig, *_: Any) -> Compilation:
        asked.append(config.compile)
        return OFF

    monkeypatch.setattr(train_step, "choose_compilation", look)
    monkeypatch.setattr(lr_find, "_STEPS", 2)
    for given in (None, True):
        find_learning_rate(dataclasses.replace(small_config(), compile=given))
    assert asked == [False, True]
