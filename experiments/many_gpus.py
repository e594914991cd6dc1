"""Measure training on several GPUs against one: `python -m experiments.many_gpus --help`.

`throughput` runs `resolvent train` with one process and with several, with equal tokens per step and process, and
compares the tokens per second of their metrics. `sequence`, under torchrun, reads one sequence with all processes:
first a short one, which is compared with a reading by the first process alone; then two training steps on a long one.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from resolvent import create_phase2_model, get_phase2_preset
from resolvent.parallel import SequenceParallel
from resolvent.training.metrics import FILE_NAME
from resolvent.training.optimizer import build_optimizer

WARM_UP = 10  # steps that compile, fill caches and find the fastest kernels

app = typer.Typer(help=__doc__, add_completion=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def throughput(
    context: typer.Context,
    processes: Annotated[int, typer.Option(help="Number of processes to compare with one.")] = 2,
    steps: Annotated[int, typer.Option(help=f"Steps of a run; the first {WARM_UP} do not count.")] = 60,
) -> None:
    """Measure tokens per second of one process and of several; all other options go to `resolvent train`."""
    alone = tokens_per_second(1, steps, context.args)
    together = tokens_per_second(processes, steps, context.args)
    print(f"1 process: {alone:,.0f} tokens/s")
    print(f"{processes} processes: {together:,.0f} tokens/s, {together / alone:.3f} times as many")


def tokens_per_second(processes: int, steps: int, options: list[str]) -> float:
    """Return the median over the steps of a run."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train = ["-m", "resolvent", "train", "--out", str(run), "--steps", str(steps)]
        reports = ["--eval-interval", "0", "--final-eval-tokens", "1", "--checkpoint-interval", "0"]
        # Standard error takes the output of the run, beside the messages of torchrun.
        subprocess.run([*launch, *train, *reports, *options], check=True, stdout=2)
        records = [json.loads(line) for line in (run / FILE_NAME).read_text().splitlines()]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return statistics.median(speeds[WARM_UP:])


@app.command()
def sequence(
    preset: Annotated[str, typer.Option(help="Size of the model.")] = "base",
    tokens: Annotated[int, typer.Option(help="Length of the sequence that is trained on.")] = 1 << 20,
    check_tokens: Annotated[int, typer.Option(help="Length of the one that is compared.")] = 1 << 14,
) -> None:
    """Read one sequence with all processes that torchrun started."""
    device = begin()
    say(f"{dist.get_world_size()} processes on {device.type}, {preset}, float32")
    compare(preset, check_tokens, device)
    say(f"training on one sequence of {tokens:,} tokens, blocks recomputed in the backward pass")
    train(preset, tokens, device)
    dist.destroy_process_group()


def begin() -> torch.device:
    """Join the process group; return the device of this process."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_node_local_rank())
    return torch.device("cuda", torch.cuda.current_device())


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def compare(preset: str, tokens: int, device: torch.device) -> None:
    """Compare loss, gradient and time of all processes with those of the first process alone."""
    model, ids, labels = make(preset, tokens, device)
    parallel = SequenceParallel(model)

    def together() -> Tensor:
        loss = parallel(parallel.stretch(ids), labels=parallel.stretch(labels))
        loss.backward()
        parallel.sum_gradients()
        return loss.detach()

    def alone() -> Tensor:
        loss = model(ids, labels=labels)
        loss.backward()
        return loss.detach()

    theirs, theirs_seconds = timed(model, together)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    if dist.get_rank() == 0:
        mine, my_seconds = timed(model, alone)
        pairs = [(a, parameter.grad) for a, parameter in zip(gradients, model.parameters(), strict=True)]
        largest = max((a - b).abs().max().item() for a, b in pairs)
        relative = (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt()
        print(f"{tokens:,} tokens: loss {mine.item():.7f}, apart by {abs(mine - theirs).item():.1e}")
        print(f"gradients apart by {largest:.1e} at most, {relative.item():.1e} relative root mean square")
        print(f"forward and backward: {my_seconds:.4f} s alone, {theirs_seconds:.4f} s together", flush=True)
    dist.barrier()


def timed(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return the result of a run, and the least seconds of several runs."""
    seconds = []
    for _ in range(4):
        model.zero_grad()
        wait_for_device()
        start = time.perf_counter()
        result = run()
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def train(preset: str, tokens: int, device: torch.device) -> None:
    """Train two steps on one sequence; the first includes one-time preparations."""
    model, ids, labels = make(preset, tokens, device)
    model.recompute_blocks()
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    parallel = SequenceParallel(model)
    ids, labels = parallel.stretch(ids), parallel.stretch(labels)
    for step in (1, 2):
        wait_for_device()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = parallel(ids, labels=labels)
        loss.backward()
        parallel.sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait_for_device()
        seconds = time.perf_counter() - start
        speed = f"{seconds:.2f} s, {tokens / seconds:,.0f} tokens/s"
        say(f"step {step}: loss {loss.item():.4f}, gradient {norm.item():.4f}, {speed}")
    if device.type == "cuda":
        say(f"peak memory of the first process: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def make(preset: str, tokens: int, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """Return a model, equal in all processes, and random tokens with labels."""
    torch.manual_seed(0)
    config = dataclasses.replace(get_phase2_preset(preset), dropout=0.0)
    model = create_phase2_model(config, device=device).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # weights that start at zero would hide their inputs
                parameter.copy_(torch.randn(parameter.shape) * 0.02)
    text = torch.randint(0, config.vocab_size, (1, tokens + 1)).to(device)
    return model, text[:, :-1], text[:, 1:]


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    app()
