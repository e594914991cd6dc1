"""A short run in a process of its own, which the test kills. Processes are forked from one that has loaded torch."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from resolvent.models.phase2 import Phase2Config
from resolvent.training import TrainingConfig, resume, train
from resolvent.training.config import Tracker
from resolvent.training.run_folder import has_begun

torch.set_num_threads(1)

TEXT = "<|endoftext|>\n".join(f"Verse {n}: the {n % 7}th stone is not the {n % 5}th.\n" * 2 for n in range(12))
CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
"""Audit events of Python for changes of a file or folder."""


def minute_config(data: Path, out: Path, tracker: Tracker = "none") -> TrainingConfig:
    """A run of a fraction of a second with everything that has a state: accumulation, dropout, schedule, averages."""
    model = Phase2Config(vocab_size=257, d_model=16, n_layers=1, n_seq=32, num_heads=2, head_dim=8, dropout=0.1)
    sizes: dict[str, Any] = dict(steps=7, seq_len=32, batch_size=2, accumulation=2, learning_rate=0.01)
    reports: dict[str, Any] = dict(eval_interval=3, eval_tokens=100, final_eval_tokens=100, checkpoint_interval=2)
    where: dict[str, Any] = dict(data=str(data), out=str(out), tracker=tracker, device="cpu")
    return TrainingConfig(**where, preset=None, model=model, schedule="wsd", **sizes, **reports)


def start(
    data: Path, out: Path, die_at: int = 0, count_into: Path | None = None, tracker: Tracker = "none"
) -> BaseProcess:
    """Begin the run or go on with it, in another process.

    Args:
        data: the text.
        out: the run folder.
        die_at: the process kills itself when it is about to touch the run folder for this time; 0 for never.
        count_into: a file that gets the number of times it did.
        tracker: of the run.
    """
    return fork(_live, data, out, die_at, count_into, tracker)


def fork(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Begin to run a function in another process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def _live(data: Path, out: Path, die_at: int, count_into: Path | None, tracker: Tracker) -> None:
    touched = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in CHANGES and str(out) in str(arguments[0]):
            touched += 1
            if touched == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    resume(out) if has_begun(out) else train(minute_config(data, out, tracker))
    if count_into is not None:
        count_into.write_text(str(touched))
