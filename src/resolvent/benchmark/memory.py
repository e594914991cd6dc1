"""Peak memory of a training step, beside the memory that the configuration is meant for.

A step as in `resolvent train`: its optimiser, with dropout, without compilation; bfloat16 autocast on CUDA. The second
step is measured, with the averages of the optimiser. Without CUDA, the figure is the memory of a process.
"""

import multiprocessing
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resolvent.benchmark.harness import Bench, Measurement, Scale
from resolvent.benchmark.report import Target
from resolvent.models import IntegratedModel
from resolvent.models.phase1 import Phase1Config, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel, get_phase2_preset
from resolvent.training.optimizer import build_optimizer

SECTION = "memory"


@dataclass(frozen=True)
class Case:
    """Case of a training step at the length of the configuration.

    Attributes:
        source: a preset of Phase 2, or the GB of a GPU for which Phase 1 has a configuration.
        batch: sequences.
        recompute: whether activation checkpointing is on.
        tighter: a target below the memory that the configuration names.
    """

    source: str | float
    batch: int
    recompute: bool = False
    tighter: Target | None = None

    @property
    def config(self) -> Phase1Config | Phase2Config:
        if isinstance(self.source, str):
            return get_phase2_preset(self.source)
        return Phase1Config.for_hardware(self.source)

    @property
    def target(self) -> Target:
        """Target: the memory that the configuration names; for Phase 2, the goal is half of it."""
        limit = self.config.target_vram_gb
        if self.tighter is not None:
            return self.tighter
        return Target(limit / 2, limit) if isinstance(self.source, str) else Target(limit)

    def __str__(self) -> str:
        model = self.source if isinstance(self.source, str) else f"Phase 1 for {self.source:g} GB"
        return f"{model}, B{self.batch} N{self.config.n_seq}{', recomputed' * self.recompute}"


CASES = {
    "cuda": (
        Case("small", 8),
        Case("base", 8),
        Case("large", 8, tighter=Target(10.0, 14.0)),
        Case("large", 8, recompute=True),
        *(Case(vram, batch) for vram in (8.0, 10.0, 24.0) for batch in (1, 8)),
    ),
    "cpu": (Case("small", 1), Case("base", 1), Case("base", 1, recompute=True), Case(8.0, 1)),
    "quick": (Case("tiny", 1),),
}


def measurements(scale: Scale) -> list[Measurement]:
    """Return a measurement of a step of every configuration of a scale."""
    return [Measurement(SECTION, str(case), partial(_measure, case=case)) for case in CASES[scale]]


def _measure(bench: Bench, case: Case) -> None:
    step = partial(training_peak, case, bench.device.type)
    if bench.device.type != "cuda":
        step = partial(in_fresh_process, step)
    outcome = bench.measure(str(case), lambda _: step())
    bench.add(SECTION, str(case), "GiB", outcome, target=case.target)


def training_peak(case: Case, device: str) -> float:
    """Return the peak GiB of two training steps; on the CPU without the memory that the process held before."""
    before = 0 if device == "cuda" else peak_resident_bytes()
    model = _create(case.config).to(device).train()
    if case.recompute:
        model.recompute_blocks()
    model.update_rank_schedule(sys.maxsize)  # all channels in use
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    ids = torch.randint(model.vocab_size, (case.batch, model.n_seq + 1), device=device)
    options = {"return_penalty": True} if model.penalised else {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = model(ids[:, :-1], labels=ids[:, 1:], **options)
        (output[0] + output[1] if options else output).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes() - before) / 2**30


def _create(config: Phase1Config | Phase2Config) -> IntegratedModel:
    if isinstance(config, Phase2Config):
        return Phase2IntegratedModel(config)
    return Phase1IntegratedModel(config)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function in a new process, since a process keeps only its highest peak."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except KeyboardInterrupt:  # the pool would wait for the function
            for process in multiprocessing.active_children():
                process.kill()
            raise


def peak_resident_bytes() -> int:
    """Return the peak memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # a forked process would begin with the peak of its parent
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
