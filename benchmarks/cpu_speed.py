"""Speed and memory on the CPU beside a Transformer of the same size: `python benchmarks/cpu_speed.py`.

Both models train (forward, backward, AdamW) and generate in turns within one run, in float32 at batch 1 and without
dropout, so that whatever else slows the machine slows both. Times are medians after a warm-up, with an allocator that
keeps what was freed. Each peak of memory is that of a process of its own, with the allocator as it comes. Nothing is
timed unless the model computes the same in one pass as token by token.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resolvent import Phase2Config, Phase2IntegratedModel, create_phase2_model, get_phase2_preset
from resolvent.benchmark import memory
from resolvent.benchmark.memory import peak_resident_bytes
from resolvent.benchmark.peers import GPT

OURS, TRANSFORMER = "resolvent", "GPT"
MODELS = (OURS, TRANSFORMER)
CHECKED_TOKENS = 130  # two consolidations and a bit
TOLERANCE = 1e-4  # of the logits' scale
WARM_UPS = 2  # the first steps pay for fresh pages of memory
NOTABLE_SHARE = 0.05  # of the CPU, taken by other processes
STARTED = time.perf_counter()

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35), "MALLOC_TOP_PAD_": str(2**28)}
SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}  # as the command line sets it; threads else spin while others compute
"""glibc otherwise returns every large tensor to the kernel, and a step measures how fast that one hands out pages."""

console = Console()


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        preset: the model's preset, whose sizes the Transformer takes too.
        training: sequence length, number of timed rounds and least acceptable ratio of our tokens/s to theirs.
        read: tokens read before generation is timed; our times after the first and the last should be equal.
        piece: tokens read in one pass.
        generated: tokens generated in a round, as many as lie between two consolidations.
        rounds: number of timed rounds of generation.
    """

    preset: str
    training: tuple[tuple[int, int, float | None], ...]
    read: tuple[int, int]
    piece: int
    generated: int = 64
    rounds: int = 3
    generation_tolerance: float | None = 0.1


FULL = Plan("base", training=((1024, 5, 0.7), (4096, 5, 1.0)), read=(100, 20_000), piece=1000)
QUICK = Plan(
    "tiny", training=((64, 2, None), (128, 2, None)), read=(20, 200), piece=50, rounds=2, generation_tolerance=None
)


@dataclass(frozen=True)
class Row:
    """A line of the table: a quantity of both models, and what it ought to be.

    Attributes:
        met: whether the target is met; None where there is none.
    """

    name: str
    unit: str
    ours: float
    transformer: float
    target: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.transformer


def configuration(preset: str) -> Phase2Config:
    """The preset without dropout, which the Transformer has not either."""
    return dataclasses.replace(get_phase2_preset(preset), dropout=0.0)


def create(name: str, preset: str) -> Phase2IntegratedModel | GPT:
    """One of the two models, with random weights."""
    torch.manual_seed(0)
    config = configuration(preset)
    return GPT.like(config) if name == TRANSFORMER else create_phase2_model(config=config, device=torch.device("cpu"))


def random_ids(preset: str, length: int) -> Tensor:
    return torch.randint(configuration(preset).vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- correctness


def largest_difference(preset: str, threads: int) -> float:
    """How far the logits of one pass and those of reading token by token are apart, relative to their scale."""
    torch.set_num_threads(threads)
    model = create(OURS, preset).eval()
    ids, state, single = random_ids(preset, CHECKED_TOKENS), None, []
    with torch.inference_mode():
        for parameter in model.parameters():
            # Some parts of a fresh model are zero; noise lets every part have its say.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        whole = model(ids)
        for token in ids.split(1, dim=1):
            logits, state = model(token, state=state, return_state=True)
            single.append(logits)
    return ((torch.cat(single, dim=1) - whole).abs().max() / whole.abs().max()).item()


# ---------------------------------------------------------------------------------------------------- training


class Trainer:
    """A model with its optimizer, and one training step of it."""

    def __init__(self, name: str, preset: str) -> None:
        self.model = create(name, preset).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, ids: Tensor) -> None:
        """Predict each of the tokens (1, N + 1) from those before it, and learn."""
        self.model(ids[:, :-1], labels=ids[:, 1:]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peak_memory(name: str, preset: str, length: int, threads: int) -> int:
    """Bytes that two training steps take at their peak, beyond what this process held before.

    It has to run in a process of its own, since a process remembers its highest peak only.
    """
    torch.set_num_threads(threads)
    before = peak_resident_bytes()
    trainer = Trainer(name, preset)
    for _ in range(2):  # from the second step on, the optimizer's averages lie beside the activations
        trainer.step(random_ids(preset, length + 1))
    return peak_resident_bytes() - before


def start_over_keeping_freed_memory() -> None:
    """The C library glibc reads its settings when a process starts."""
    settings = KEEP_FREED_MEMORY | SHORT_SPIN
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """In one whose allocator is as it comes."""
    for name in KEEP_FREED_MEMORY:
        os.environ.pop(name, None)
    return memory.in_fresh_process(function, *arguments)


# -------------------------------------------------------------------------------------------------- generation


class OurReader:
    """Generation from a state of constant size."""

    def __init__(self, model: Phase2IntegratedModel, ids: Tensor, piece: int) -> None:
        self.model, self.start = model, None
        for part in ids.split(piece, dim=1):
            _, self.start = model(part, state=self.start, return_state=True)
        self.state = self.start

    def restart(self) -> None:
        """Forget what was generated."""
        self.state = self.start

    def read(self, token: Tensor) -> Tensor:
        """Logits (1, 1, V) after one more token (1, 1)."""
        logits, self.state = self.model(token, state=self.state, return_state=True)
        return logits


class TransformerReader:
    """Generation from a cache of keys and values with room for `room` tokens to come."""

    def __init__(self, model: GPT, ids: Tensor, piece: int, room: int) -> None:
        self.model, self.length = model, ids.size(1)
        self.cache = model.new_cache(batch_size=1, capacity=self.length + room)
        for part in ids.split(piece, dim=1):
            model(part, cache=self.cache)

    def restart(self) -> None:
        """Forget what was generated."""
        self.cache.length = self.length

    def read(self, token: Tensor) -> Tensor:
        """Logits (1, 1, V) after one more token (1, 1)."""
        return self.model(token, cache=self.cache)


def generate(reader: OurReader | TransformerReader, count: int) -> None:
    """Take the likeliest token, `count` times."""
    reader.restart()
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(count):
        token = reader.read(token).argmax(dim=-1)


# ------------------------------------------------------------------------------------------------ measurements


def median_seconds(jobs: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """Median time of each job, all run to warm up and then timed in turns, forwards and backwards."""
    times: dict[Any, list[float]] = {key: [] for key in jobs}
    for job in [*jobs.values()] * WARM_UPS:
        job()
    started, others = time.perf_counter(), cpu_seconds_of_others()
    for turn in range(rounds):
        for key in list(jobs)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            jobs[key]()
            times[key].append(time.perf_counter() - start)
    share = (cpu_seconds_of_others() - others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
    if share > NOTABLE_SHARE:
        progress(f"[yellow]other processes used {share:.0%} of the CPU meanwhile: measure again when it is idle[/]")
    return {key: statistics.median(values) for key, values in times.items()}


def cpu_seconds_of_others() -> float:
    """Time that this machine's processors have spent so far on anything but this process."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - own.user - own.system


def measure_memory(plan: Plan, threads: int) -> Iterable[Row]:
    for length, *_ in plan.training:
        peaks = {}
        for name in MODELS:
            progress(f"peak memory of a training step of {length} tokens: {name}")
            peaks[name] = in_fresh_process(peak_memory, name, plan.preset, length, threads) / 2**30
        yield Row(f"memory, N = {length}", "GiB", peaks[OURS], peaks[TRANSFORMER])


def measure_training(plan: Plan) -> Iterable[Row]:
    trainers = {name: Trainer(name, plan.preset) for name in MODELS}
    for length, rounds, least in plan.training:
        progress(f"training steps of {length} tokens: {rounds} rounds after {WARM_UPS} to warm up")
        ids = random_ids(plan.preset, length + 1)
        seconds = median_seconds({name: partial(trainers[name].step, ids) for name in MODELS}, rounds)
        ours, transformer = (length / seconds[name] for name in MODELS)
        target, met = ("", None) if least is None else (f"ratio >= {least:.1f}", ours / transformer >= least)
        yield Row(f"training, N = {length}", "tokens/s", ours, transformer, target, met)


@torch.inference_mode()
def measure_generation(plan: Plan) -> list[Row]:
    jobs: dict[tuple[str, int], Callable[[], None]] = {}
    for name in MODELS:
        model = create(name, plan.preset).eval()
        for count in plan.read:
            progress(f"reading {count} tokens: {name}")
            ids = random_ids(plan.preset, count)
            if isinstance(model, GPT):
                reader = TransformerReader(model, ids, plan.piece, room=plan.generated)
            else:
                reader = OurReader(model, ids, plan.piece)
            jobs[name, count] = partial(generate, reader, plan.generated)
    progress(f"generating {plan.generated} tokens: {plan.rounds} rounds after {WARM_UPS} to warm up")
    seconds = median_seconds(jobs, plan.rounds)
    ms = {key: 1000 * value / plan.generated for key, value in seconds.items()}
    rows = [Row(f"token after {count}", "ms", ms[OURS, count], ms[TRANSFORMER, count]) for count in plan.read]
    few, many = plan.read
    growth = {name: ms[name, many] / ms[name, few] for name in MODELS}
    target, met = "", None
    if (within := plan.generation_tolerance) is not None:
        target, met = f"ours <= {1 + within:.1f}", growth[OURS] <= 1 + within
    return [*rows, Row(f"after {many} / {few}", "times", growth[OURS], growth[TRANSFORMER], target, met)]


# ------------------------------------------------------------------------------------------------------ report


def progress(message: str) -> None:
    console.print(f"[dim]{time.perf_counter() - STARTED:4.0f} s[/] {message}", highlight=False)


def as_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in ("", "unit", OURS, TRANSFORMER, "ratio", "target", ""):
        is_number = header in (OURS, TRANSFORMER, "ratio")
        table.add_column(header, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[row.met]
        numbers = [number(row.ours), number(row.transformer), f"{row.ratio:.2f}"]
        table.add_row(row.name, row.unit, *numbers, row.target, verdict)
    return table


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def as_dict(plan: Plan, threads: int, parameters: dict[str, int], difference: float, rows: list[Row]) -> dict[str, Any]:
    return {
        "plan": dataclasses.asdict(plan),
        "threads": threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": parameters,
        "one_pass_against_token_by_token": difference,
        "rows": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows],
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and few tokens: does it run?")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")] = None,
) -> None:
    """Measure training speed, generation speed and memory beside a Transformer of the same size."""
    plan = QUICK if quick else FULL
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    # Models are made in other processes until all peaks are taken: a process hands its own peak on to its children.
    progress(f"one pass against token by token, {CHECKED_TOKENS} tokens")
    difference = in_fresh_process(largest_difference, plan.preset, threads)
    if not difference <= TOLERANCE:
        console.print(
            f"[red]The model is wrong:[/] one pass and token by token differ by {difference:.1e} of the scale"
        )
        raise typer.Exit(1)
    memory = list(measure_memory(plan, threads))
    sizes = {name: create(name, plan.preset).num_parameters() for name in MODELS}
    rows = [*measure_training(plan), *measure_generation(plan), *memory]
    models = f"{plan.preset} ({sizes[OURS] / 1e6:.2f}M) beside a GPT ({sizes[TRANSFORMER] / 1e6:.2f}M)"
    if json_path:
        json_path.write_text(json.dumps(as_dict(plan, threads, sizes, difference, rows), indent=2) + "\n")
    console.print(as_table(rows, f"{models}\n{threads} CPU threads, float32, batch 1; ratio: ours / GPT"))


if __name__ == "__main__":
    start_over_keeping_freed_memory()
    typer.run(main)
