"""`python -m experiments.quality`: prepare tokens, train the entries, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer

from experiments.quality import across, language, models, mqar, needle, report, results, tracking, variants
from experiments.quality.training import Clock, Mode, OutOfTimeError
from resolvent.evaluation.needle import NEAREST

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
console = Console(stderr=True)

_RECALL_RATES = ",".join(f"{rate:.3g}" for rate in mqar.LEARNING_RATES)

GROUPS = {
    "peers": (*models.PEERS, "phase2"),
    "ablation": variants.ABLATION,
    "mixers": (*mqar.MIXERS, "phase2"),
    "rotations": tracking.MODELS,
}
"""Names that stand for several models."""

Models = Annotated[str, typer.Option(help=f"Names, parted by commas; {', '.join(GROUPS)} stand for several.")]
Rates = Annotated[str, typer.Option("--lr", help="Peak learning rates, or 'best' for the best that --out holds.")]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds, from --first-seed on.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="The first seed.")]
Budget = Annotated[float, typer.Option(help="Seconds after which no run goes on; one that cannot end is not begun.")]
Out = Annotated[Path, typer.Option(help="File of runs, a line each; what it holds is not run again.")]
Commit = Annotated[str, typer.Option(help="Commit of the code, for the records.")]
MuonRatio = Annotated[
    float | None,
    typer.Option(help="Learning rate of Muon over --lr, which is AdamW's.", show_default="AdamW alone"),
]
Switching = Annotated[bool, typer.Option(help="Measure Phase 2 with each of its mechanisms off, too.")]
Compile = Annotated[bool, typer.Option(help="Compile the blocks (on CUDA).")]
Capture = Annotated[bool, typer.Option(help="Replay each step as a CUDA graph (on CUDA).")]


@app.command()
def tokens(
    corpus: Annotated[list[Path], typer.Option(help="A text file or a folder; may be given several times.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    tokenizer: Annotated[str, typer.Option(help="bpe, gpt2, bytes or characters.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens of bpe.")] = 16384,
    part_field: Annotated[
        str | None, typer.Option(help="Field of JSON Lines that names the part of the corpus.")
    ] = None,
) -> None:
    """Encode text into a file of tokens."""
    if tokenizer == "characters":
        text = language.Text.of_characters(corpus)
    else:
        text = language.Text.of_corpus(corpus, tokenizer, vocab_size, part_field)
    text.save(out)
    say(f"{out}: {len(text.train):,} tokens to learn from, {text.predicted:,} held out, {text.vocabulary:,} different")


@app.command("language")
def learn_language(
    text: Annotated[Path, typer.Option(help="Output file of `tokens`, or output folder of `resolvent tokenize`.")],
    out: Out,
    commit: Commit,
    plan: Annotated[
        str, typer.Option(help=f"{', '.join(language.PLANS)}: what the options below start from.")
    ] = "corpus",
    names: Annotated[str, typer.Option("--models", help=Models.__metadata__[0].help)] = "peers",
    rates: Rates = "1e-3",
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    budget_seconds: Budget = 500.0,
    steps: int | None = None,
    batch: int | None = None,
    length: int | None = None,
    parameters: int | None = None,
    dropout: float | None = None,
    evaluations: Annotated[int | None, typer.Option(help="Validations in a run, evenly spread.")] = None,
    extrapolate: Annotated[int | None, typer.Option(help="Tokens of long stretches to read at the end.")] = None,
    books: Annotated[Path | None, typer.Option(help="Text of those stretches, in place of the held-out text.")] = None,
    stretches: Annotated[int, typer.Option(min=1, help="Most stretches of a document of --books.")] = 2,
    muon_ratio: MuonRatio = None,
    switching: Switching = True,
    save: Annotated[Path | None, typer.Option(help="Folder for the Phase 2 models, one each.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help=Compile.__metadata__[0].help)] = True,
    capture: Capture = True,
) -> None:
    """Train models to predict text, and validate them."""
    clock = Clock.of(budget_seconds)
    chosen = planned(
        plan,
        steps=steps,
        batch=batch,
        length=length,
        parameters=parameters,
        dropout=dropout,
        evaluations=evaluations,
        extrapolate=extrapolate,
        muon_ratio=muon_ratio,
    )
    corpus, device = language.Text.load(text), pick_device()
    mode = mode_for(device, compiled, capture, autocast=True)
    jobs = Jobs(out, language.settings(chosen, corpus), rates, range(first_seed, first_seed + seeds), "loss", True)
    long = language.book_stretches(books, corpus.tokenizer, chosen.extrapolate, stretches) if books else None
    origin = {"commit": commit, "corpus_sha256": corpus.digest}

    def experiment(name: str) -> language.Experiment:
        entry = models.build(name, chosen.size(corpus.vocabulary), device)
        return language.Experiment(entry, corpus, chosen, mode, long, switching)

    def keep(found: language.Experiment, record: results.Record) -> None:
        if save is not None:
            found.save(save / f"{record['model'].replace('/', '_')}-{record['learning_rate']:.3g}-{record['seed']}")

    with until(clock):
        for name in expand(names):
            run_all(jobs, name, experiment, clock, keep, origin)


@app.command("needle")
def learn_needle(
    text: Annotated[Path, typer.Option(help="Output file of `tokens`, with a tokenizer.")],
    out: Out,
    commit: Commit,
    plan: Annotated[str, typer.Option(help=", ".join(language.PLANS))] = "corpus",
    names: Annotated[str, typer.Option("--models", help=Models.__metadata__[0].help)] = "peers",
    rates: Rates = "2e-3",
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    budget_seconds: Budget = 500.0,
    steps: int | None = None,
    length: int | None = None,
    muon_ratio: MuonRatio = None,
    longest: Annotated[int, typer.Option(min=NEAREST, help="Longest distance.")] = needle.Probe.longest,
    samples: Annotated[int, typer.Option(min=1, help="Keys asked for at every distance.")] = needle.Probe.samples,
    switching: Switching = True,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help=Compile.__metadata__[0].help)] = True,
    capture: Capture = True,
) -> None:
    """Train models on text with questions about facts, and test recall over growing distances."""
    clock, corpus, device = Clock.of(budget_seconds), language.Text.load(text), pick_device()
    if not corpus.tokenizer:
        raise typer.BadParameter(f"{text} holds characters: questions take a tokenizer")
    chosen, probe = planned(plan, steps=steps, length=length, muon_ratio=muon_ratio), needle.Probe(longest, samples)
    phrases = needle.Phrases.of(Tokenizer.from_str(corpus.tokenizer))
    mode = mode_for(device, compiled, capture, autocast=True)
    seeds_wanted = range(first_seed, first_seed + seeds)
    jobs = Jobs(out, needle.settings(chosen, corpus, probe), rates, seeds_wanted, "loss", True)

    def experiment(name: str) -> needle.Experiment:
        entry = models.build(name, chosen.size(corpus.vocabulary), device)
        return needle.Experiment(entry, corpus, chosen, mode, phrases, probe, switching)

    with until(clock):
        for name in expand(names):
            run_all(jobs, name, experiment, clock, origin={"commit": commit, "corpus_sha256": corpus.digest})


@app.command("mqar")
def learn_recall(
    out: Out,
    names: Annotated[str, typer.Option("--models", help=Models.__metadata__[0].help)] = "mixers",
    rates: Rates = _RECALL_RATES,
    widths: Annotated[str, typer.Option(help="Widths of the model, parted by commas.")] = "64,128,256",
    heads: Annotated[str, typer.Option(help="Numbers of heads, parted by commas (attention has one).")] = "2",
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    budget_seconds: Budget = 500.0,
    epochs: Annotated[int, typer.Option(help="Passes; the paper has 32.")] = 32,
    part: Annotated[float, typer.Option(min=0.001, max=1.0, help="Part of the training sequences.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help=Compile.__metadata__[0].help)] = False,
    capture: Capture = True,
) -> None:
    """Train models of two layers on multi-query associative recall, and test them."""
    clock, device = Clock.of(budget_seconds), pick_device()
    plan = mqar.Plan(epochs=epochs, part=part)
    mode = mode_for(device, compiled, capture, autocast=False)
    data = mqar.draw(plan, device)
    with until(clock):
        for width, count in [(int(w), int(h)) for w in widths.split(",") for h in heads.split(",")]:
            shared = mqar.settings(plan, width, count)
            jobs = Jobs(out, shared, rates, range(first_seed, first_seed + seeds), "accuracy", False)

            def experiment(name: str, width: int = width, count: int = count) -> mqar.Experiment:
                entry = mqar.build(name, width, count, plan.vocabulary, device)
                return mqar.Experiment(entry, plan, mode, data)

            for name in expand(names):
                run_all(jobs, name, experiment, clock)


@app.command("tracking")
def learn_tracking(
    out: Out,
    commit: Commit,
    tasks: Annotated[str, typer.Option(help=f"Of {', '.join(tracking.TASKS)}, parted by commas.")] = "parity",
    names: Annotated[str, typer.Option("--models", help=Models.__metadata__[0].help)] = "rotations",
    rates: Rates = "3e-3",
    layers: Annotated[str, typer.Option(help="Numbers of layers, parted by commas.")] = "1",
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    budget_seconds: Budget = 500.0,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = tracking.Plan.steps,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = tracking.Plan.batch,
    longest: Annotated[int, typer.Option(min=3, help="Largest length in training.")] = tracking.Plan.longest,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of matrices.")] = tracking.Plan.weight_decay,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help=Compile.__metadata__[0].help)] = False,
    capture: Capture = True,
) -> None:
    """Train models to track the state of a group, and test them on longer sequences."""
    clock, device = Clock.of(budget_seconds), pick_device()
    mode = mode_for(device, compiled, capture, autocast=False)
    with until(clock):
        for task, count in [(task, int(n)) for task in tasks.split(",") for n in layers.split(",")]:
            shape = dict(layers=count, steps=steps, batch=batch, longest=longest)
            plan = tracking.Plan(task, **shape, weight_decay=weight_decay)
            jobs = Jobs(out, plan.settings(), rates, range(first_seed, first_seed + seeds), "accuracy", False)

            def experiment(name: str, plan: tracking.Plan = plan) -> tracking.Experiment:
                return tracking.Experiment(tracking.build(name, plan, device), plan, mode, commit)

            for name in expand(names):
                run_all(jobs, name, experiment, clock)


@app.command("report")
def print_report(
    paths: Annotated[list[Path], typer.Argument(help="Files of runs.")],
    less: Annotated[str | None, typer.Option(help="Model whose losses by position and part are subtracted.")] = None,
) -> None:
    """Print tables of the runs: best learning rates, means and standard errors, paired differences."""
    runs = _runs(paths)
    for table in [*report.tables(runs), *across.tables(runs, less)]:
        Console(width=200).print(table, "")


@app.command("plot")
def draw_report(
    paths: Annotated[list[Path], typer.Argument(help="Files of runs.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .svg, .png or .pdf.")],
) -> None:
    """Plot the runs: losses, gains of mechanisms, recall by the size of the state and by distance."""
    from experiments.quality import plots  # needs matplotlib

    plots.plot(_runs(paths), out)
    say(f"{out}")


def _runs(paths: Sequence[Path]) -> list[results.Record]:
    """Return the records of all files, each run once."""
    return list({results.key(record): record for record in results.read(paths)}.values())


# ------------------------------------------------------------------------------------------------------------ runs


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Runs that are requested of every model.

    Attributes:
        out: file of runs.
        settings: settings that all runs share.
        rates: learning rates, or ``best``.
        seeds: of each learning rate.
        score: name of the score that learning rates are compared by.
        smallest: whether a lower score is better.
    """

    out: Path
    settings: dict[str, Any]
    rates: str
    seeds: Sequence[int]
    score: str
    smallest: bool

    def of(self, name: str) -> list[results.Record]:
        """Return the missing runs of a model; the first seed of each learning rate comes first."""
        done = [record for record in results.read([self.out]) if record["model"] == name]
        ours = [record for record in done if self._is_ours(record)]
        rates = [float(rate) for rate in self.rates.split(",")] if self.rates != "best" else [self._best(name, ours)]
        wanted = [
            {"settings": self.settings, "model": name, "learning_rate": rate, "seed": seed}
            for seed in self.seeds
            for rate in rates
        ]
        keys = {results.key(record) for record in ours}
        return [record for record in wanted if results.key(record) not in keys]

    def _is_ours(self, record: results.Record) -> bool:
        return results.setting(record) == results.setting({"settings": self.settings})

    def _best(self, name: str, runs: list[results.Record]) -> float:
        # A variant without runs takes the learning rate of its base model.
        kin = runs or [
            record
            for record in results.read([self.out])
            if self._is_ours(record) and record["model"] == name.partition("/")[0]
        ]
        best = results.best_learning_rate(kin, self.score, self.smallest)
        if best is None:
            raise typer.BadParameter(f"{self.out} holds no run of {name} with these settings: name learning rates")
        return best


def run_all(
    jobs: Jobs,
    name: str,
    experiment: Callable[[str], Any],
    clock: Clock,
    keep: Callable[[Any, results.Record], None] = lambda found, record: None,
    origin: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Make the missing runs of a model, and write each as soon as it ends, together with ``origin``.

    Raises:
        OutOfTimeError: the budget does not suffice for the next run.
    """
    wanted = jobs.of(name)
    if not wanted:
        return
    say(f"{name}: {len(wanted)} run(s) to make, {clock.left():.0f} s left")
    found = experiment(name)
    say(f"{name}: prepared in {found.trainer.preparation_seconds:.0f} s; a run takes about {found.seconds:.0f} s")
    for record in wanted:
        record |= {**origin, **found.run(record["learning_rate"], record["seed"], clock)}
        results.append(jobs.out, record)
        keep(found, record)
        score = record[jobs.score] if record["finite"] else "not finite"
        say(f"{name} lr {record['learning_rate']:.3g} seed {record['seed']}: {jobs.score} {score}")
    del found
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def until(clock: Clock) -> Iterator[None]:
    """Stop without an error at the end of the budget; a second call continues."""
    try:
        yield
    except OutOfTimeError:
        say(f"stopped with {clock.left():.0f} s left of the budget; the same command goes on")


def expand(names: str) -> list[str]:
    """Return the models of a list of names and groups, each once."""
    return list(dict.fromkeys(model for name in names.split(",") for model in GROUPS.get(name, (name,))))


def planned(plan: str, **given: Any) -> language.Plan:
    """Return the plan of a name, with its fields replaced by options that are not None."""
    return dataclasses.replace(language.PLANS[plan], **{name: x for name, x in given.items() if x is not None})


def mode_for(device: torch.device, compiled: bool, captured: bool, autocast: bool) -> Mode:
    """Return the mode: on CUDA with compilation, capture and half precision, and TF32 products."""
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    return Mode(compiled and cuda, captured and cuda, autocast and cuda)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(message: str) -> None:
    console.print(f"[{time.strftime('%H:%M:%S')}] {message}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
