"""Compare a converted Phase 1 model with one trained from scratch: `python -m experiments.conversion`.

For every seed a Phase 1 model is trained and converted to Phase 2. Then both are trained for the same number of steps
again, on the same batches, with the same schedule. A Phase 2 model of the same sizes is trained from fresh weights on
the total number of tokens. All use the learning rate of fresh weights, and all are validated on the same held-out
documents, which are read whole.

Every training is a run folder below --out: finished runs are not repeated, and interrupted runs resume.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from resolvent import Phase1Config, Phase2Config, convert_phase1_to_phase2, get_phase1_preset, save_model
from resolvent.data import save_tokenizer
from resolvent.evaluation import evaluate_documents
from resolvent.runs import RUN_FILE, load_trained
from resolvent.training import TrainingConfig, resume, train
from resolvent.training.corpus import load_corpus
from resolvent.training.metrics import FILE_NAME
from resolvent.training.run_folder import read_run

SECOND_HALF = 1_000_000
"""Added to the seed of the second half, which otherwise would read the batches of the first half again."""

console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """Settings of a comparison.

    Attributes:
        model: the Phase 1 model.
        steps: optimiser steps before the conversion, and as many after it.
        out: folder for the run folders.
        data: text to learn from; None for the default corpus.
        eval_tokens: held-out tokens to validate on; 0 for all, in whole documents.
    """

    model: Phase1Config
    steps: int
    out: Path
    data: Path | None = None
    eval_tokens: int = 0


@dataclass(frozen=True)
class Model:
    """Model at the end of its training.

    Attributes:
        bits_per_byte: of the held-out text.
        parameters: number of parameters.
        tokens: number of training tokens in total.
    """

    bits_per_byte: float
    parameters: int
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """Models of a seed.

    Attributes:
        phase1: the model that is converted.
        converted: the same, converted.
        phase1_continued: Phase 1 trained on.
        converted_continued: the converted model trained on.
        phase2: Phase 2 from fresh weights.
    """

    phase1: Model
    converted: Model
    phase1_continued: Model
    converted_continued: Model
    phase2: Model


HEADINGS = {
    "phase1": "Phase 1",
    "converted": "converted, not trained on",
    "phase1_continued": "Phase 1, trained on",
    "converted_continued": "converted, trained on",
    "phase2": "Phase 2 from fresh weights",
}


def measure(plan: Plan, seed: int) -> Outcome:
    """Train and validate the models of a seed."""
    folder = plan.out.resolve() / f"seed-{seed}"

    def run(name: str, steps: int, seed: int, **model: Any) -> TrainingConfig:
        data = None if plan.data is None else str(plan.data.resolve())
        reports = dict(eval_interval=0, final_eval_tokens=plan.eval_tokens, checkpoint_interval=100, log_interval=50)
        size = dict(steps=steps, learning_rate=0.5 / plan.model.d_model)
        return TrainingConfig(out=str(folder / name), seed=seed, data=data, **size, **reports, **model)

    first = run("phase1", plan.steps, seed, phase=1, preset=None, model=plan.model)
    # Fields that `from_phase1` sets for a conversion, which fresh weights do not need.
    own = {name: getattr(Phase2Config(), name) for name in ("embedding_scale", "ffn_gated")}
    fresh = run("phase2", 2 * plan.steps, seed, preset=None, model=Phase2Config.from_phase1(plan.model, **own))
    go_on = [
        run(f"{source}-continued", plan.steps, seed + SECOND_HALF, start_from=str(folder / source))
        for source in ("phase1", "converted")
    ]
    phase1 = finished(first)
    converted = convert(first, folder / "converted", seed)
    jump = converted.bits_per_byte - phase1.bits_per_byte
    say(f"seed {seed}: converted at {phase1.bits_per_byte:.4f} bits/byte, which moved them by {jump:+.1e}")
    continued = (finished(config, phase1.tokens) for config in go_on)
    return Outcome(phase1, converted, *continued, finished(fresh))


def finished(config: TrainingConfig, tokens_before: int = 0) -> Model:
    """Return the final model of a run, which is resumed if it exists."""
    run_dir = config.run_dir
    if not (run_dir / RUN_FILE).exists():
        say(f"training {run_dir}")
        train(config, console=console)
    elif (found := read_run(run_dir)[0]) != config:
        names = [f.name for f in dataclasses.fields(config) if getattr(found, f.name) != getattr(config, f.name)]
        raise typer.BadParameter(f"{run_dir} differs in {', '.join(names)}: choose another folder", param_hint="--out")
    elif not records(run_dir)[-1].get("final"):
        say(f"going on with {run_dir}")
        resume(run_dir, console=console)
    *_, last_step, score = records(run_dir)
    parameters = load_trained(run_dir, "cpu")[0].num_parameters()
    return Model(score["validation_bits_per_byte"], parameters, tokens_before + last_step["tokens"])


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics; the final validation is the last one."""
    lines = (run_dir / FILE_NAME).read_text(encoding="utf-8").splitlines() if (run_dir / FILE_NAME).exists() else []
    return [json.loads(line) for line in lines] or [{}]


def convert(run: TrainingConfig, out: Path, seed: int) -> Model:
    """Convert the model of a finished run, and validate it without further training."""
    source, tokenizer = load_trained(run.run_dir, "cpu")
    torch.manual_seed(seed)
    model = convert_phase1_to_phase2(source)
    save_model(model, out)
    save_tokenizer(tokenizer, out)
    score = evaluate_documents(model, load_corpus(run, tokenizer).validation, max_tokens=run.final_eval_tokens or 0)
    return Model(score.bits_per_byte, model.num_parameters(), records(run.run_dir)[-2]["tokens"])


# ------------------------------------------------------------------------------------------------------ report


def say(message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def average(values: list[float], signed: bool = False) -> str:
    """Format mean ± standard error; the error needs two values."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.4f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def as_markdown(outcomes: dict[int, Outcome]) -> str:
    """Return a table of bits per byte by seed, with averages and paired differences."""

    def column(name: str, value: Callable[[Model], Any]) -> list[Any]:
        return [value(getattr(outcome, name)) for outcome in outcomes.values()]

    bits = {name: column(name, lambda model: model.bits_per_byte) for name in HEADINGS}
    gain = [a - b for a, b in zip(bits["converted_continued"], bits["phase1_continued"], strict=True)]
    head_start = [a - b for a, b in zip(bits["converted_continued"], bits["phase2"], strict=True)]
    jump = max(abs(a - b) for a, b in zip(bits["converted"], bits["phase1"], strict=True))
    rows = [
        ["bits per byte", *HEADINGS.values()],
        ["---", *["---:"] * len(HEADINGS)],
        *([f"seed {seed}", *(f"{bits[name][i]:.4f}" for name in HEADINGS)] for i, seed in enumerate(outcomes)),
        ["mean ± standard error", *(average(bits[name]) for name in HEADINGS)],
        ["tokens read", *(f"{column(name, lambda model: model.tokens)[0]:,}" for name in HEADINGS)],
        ["parameters", *(f"{column(name, lambda model: model.parameters)[0]:,}" for name in HEADINGS)],
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\n"
        f"Conversion moved the bits per byte by {jump:.1e} at most. Trained on, the converted model is\n"
        f"{average(gain, signed=True)} bits per byte from Phase 1 trained on, "
        f"and {average(head_start, signed=True)} from Phase 2 from fresh weights."
    )


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0 on.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps before the conversion, and as many after it.")] = 300,
    preset: Annotated[str, typer.Option(help="Preset of Phase 1.")] = "tiny",
    data: Annotated[Path | None, typer.Option(help="Text.", show_default="State of the Union addresses")] = None,
    eval_tokens: Annotated[int, typer.Option(min=0, help="Held-out tokens to validate on; 0 for all.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/conversion"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    """Compare a converted model, trained further, with Phase 1 trained further and Phase 2 from fresh weights."""
    plan = Plan(get_phase1_preset(preset), steps, out, data, eval_tokens)
    outcomes = {seed: measure(plan, seed) for seed in range(seeds)}
    print(as_markdown(outcomes))
    if json_path is not None:
        figures = [{"seed": seed, **dataclasses.asdict(outcome)} for seed, outcome in outcomes.items()]
        json_path.write_text(json.dumps({"preset": preset, "steps": steps, "seeds": figures}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
