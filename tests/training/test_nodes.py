"""Runs on several nodes: here, two launchers on one machine that meet over TCP (gloo)."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resolvent.data import PackedBatches
from resolvent.models.phase2 import Phase2Config
from resolvent.training import TrainingConfig, resume, train
from resolvent.training.config_file import dump_config
from tests.processes import together

from .test_distributed import assert_agree

MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture
def make(small_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Runs whose steps have two batches."""

    def config(name: str, processes: int, **changes: object) -> TrainingConfig:
        model = Phase2Config(vocab_size=257, d_model=16, n_layers=2, n_seq=32, num_heads=2, head_dim=8)
        sizes = dict(model=model, seq_len=32, steps=4, accumulation=2 // processes, learning_rate=1e-4)
        return small_config(out=str(tmp_path / name), **{**sizes, **changes})

    return config


def on_two_nodes(arguments: list[str]) -> list[str]:
    """Run the command under a launcher for each node; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meet = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*launch, *meet, f"--node-rank={rank}", "-m", "resolvent", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    for node, (_, errors) in zip(nodes, said, strict=True):
        assert node.returncode == 0, errors
    return [output for output, _ in said]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_nodes_train_as_one_process(make: MakeConfig, tmp_path: Path, parallel: str):
    config = make("nodes", 2, parallel=parallel, ema=0.5)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    first, second = on_two_nodes(["train", "--config", str(tmp_path / "run.yaml")])
    assert "step 4/4" in first and not second
    on_two_nodes(["train", "--resume", str(config.run_dir), "--steps", "6"])
    alone = train(make("alone", 1, ema=0.5)).run_dir
    resume(alone, steps=6)
    assert_agree(config.run_dir, alone)


def read_batches(config: TrainingConfig) -> list[int]:
    """Train, and return the numbers of the batches that this process made."""
    made: list[int] = []
    whole = PackedBatches.__getitem__

    def watch(self: PackedBatches, number: int) -> object:
        made.append(number)
        return whole(self, number)

    PackedBatches.__getitem__ = watch  # in a process of its own
    train(config)
    return made


def test_a_process_makes_its_own_batches_only(make: MakeConfig):
    first, second = together(2, read_batches, make("shared", 2))
    assert (first, second) == ([0, 2, 4, 6], [1, 3, 5, 7])
