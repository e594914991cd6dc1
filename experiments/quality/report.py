"""Tables of runs.

They show every model at its best learning rate, the learning rates side by side, and the gain of each mechanism.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.table import Table

from experiments.quality.results import Record, best_learning_rate, setting
from resolvent.evaluation.statistics import Estimate


class Row(NamedTuple):
    """Values over seeds, with a name."""

    name: str
    values: list[float]


def tables(records: Sequence[Record]) -> list[Table]:
    """Return all tables of the runs, for each setting by itself."""
    found = []
    for runs in by_setting(records):
        found += _TABLES[runs[0]["settings"]["task"]](runs)
    if recall := _of_task(records, "mqar"):
        found.append(_recall_curve(recall))
    return found


def average(values: Sequence[float], digits: int = 4, signed: bool = False, counted: bool = False) -> str:
    """Format mean ± standard error, which needs two values, and with ``counted`` their number."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    error = "" if len(values) < 2 else f" ± {standard_error(values):.{digits}f}"
    return f"{mean}{error} ({len(values)})" if counted else mean + error


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; zero for a single value."""
    return Estimate.of(values).standard_error or 0.0


def losses(records: Sequence[Record]) -> list[list[Row]]:
    """Return, per setting, the losses of every whole model at its best learning rate: nothing is left out of it."""
    found = []
    for runs in by_setting(_of_task(records, "language")):
        whole = {name: of for name, of in by_model(runs).items() if not _LEFT_OUT.search(name)}
        best = {name: _at_best(of, "loss", smallest=True)[1] for name, of in whole.items()}
        found.append([Row(name, [run["loss"] for run in kept]) for name, kept in best.items() if kept])
    return found


_LEFT_OUT = re.compile(r"/(no-.*|bare|original)$")
_STARTS = {"phase2/no-base-decay", "phase2/no-reach"}
"""Variants that start elsewhere, and lack nothing."""


def left_out(records: Sequence[Record]) -> list[list[Row]]:
    """Return, per setting, the loss of every model without a part less that of the model with it, paired by seed."""
    found = []
    for runs in by_setting(_of_task(records, "language")):
        models = by_model(runs)
        bases = {name: parted(name)[0] for name in models if _LEFT_OUT.search(name)}
        gaps = {name: paired(models[name], models[base]) for name, base in bases.items() if base in models}
        found.append([Row(name, values) for name, values in gaps.items() if values and name not in _STARTS])
    return found


def parted(name: str) -> tuple[str, str]:
    """Return the model that a variant is compared with, and the part that the variant lacks; empty for none."""
    base = _LEFT_OUT.sub("", name)
    return base, name.removeprefix(base).removeprefix("/").removeprefix("no-")


def switched_off(records: Sequence[Record]) -> list[list[Row]]:
    """Return, per setting, what each whole model loses with a mechanism put to zero after training, a value a seed.

    Rows are named ``model: mechanism``.
    """
    found = []
    for runs in by_setting(_of_task(records, "language")):
        rows: dict[str, list[float]] = {}
        for name, of in by_model(runs).items():
            for run in [] if _LEFT_OUT.search(name) else _at_best(of, "loss", smallest=True)[1]:
                for mechanism, (loss, _) in (run.get("switched_off") or {}).items():
                    rows.setdefault(f"{name}: {mechanism}", []).append(loss)
        found.append([Row(name, values) for name, values in rows.items()])
    return found


def positions(records: Sequence[Record], long: bool = False) -> list[dict[str, dict[int, float]]]:
    """Return, per setting, the mean loss of every whole model by the end of a bucket of positions.

    With ``long``, those of long stretches, and under ``... in windows`` those of the same tokens read in windows.
    """
    found = []
    for runs in by_setting(_of_task(records, "language")):
        kept: dict[str, list[dict[str, float]]] = {}
        for name, of in by_model(runs).items():
            for run in [] if _LEFT_OUT.search(name) else _at_best(of, "loss", smallest=True)[1]:
                if not long:
                    kept.setdefault(name, []).append(run["loss_by_position"])
                elif run.get("long"):
                    kept.setdefault(name, []).append(run["long"]["by_position"])
                    kept.setdefault(f"{name} in windows", []).append(run["long"]["in_windows"])
        found.append({name: _mean_by_end(buckets) for name, buckets in kept.items()})
    return found


def _mean_by_end(buckets: Sequence[dict[str, float]]) -> dict[int, float]:
    return {int(name.split("-")[1]): statistics.mean(run[name] for run in buckets) for name in buckets[0]}


def differences(records: Sequence[Record]) -> list[list[Row]]:
    """Return the loss of every variant of Phase 2 less that of Phase 2 as it is, for each setting.

    Only runs with the same seed and learning rate are compared.
    """
    found = []
    for runs in by_setting(_of_task(records, "language")):
        models = by_model(runs)
        gaps = {name: paired(of, models.get("phase2", [])) for name, of in models.items() if name.startswith("phase2/")}
        rows = [Row(name, values) for name, values in gaps.items() if values]
        found.append(rows)
    return found


def _of_task(records: Iterable[Record], task: str) -> list[Record]:
    return [record for record in records if record["settings"]["task"] == task]


def by_setting(records: Iterable[Record]) -> list[list[Record]]:
    """Return the runs of each setting."""
    return [list(group) for _, group in groupby(sorted(records, key=setting), key=setting)]


def by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the runs of each model, in the order of their first runs."""
    models: dict[str, list[Record]] = {}
    for record in records:
        models.setdefault(record["model"], []).append(record)
    return models


def _at_best(runs: list[Record], score: str, smallest: bool) -> tuple[float, list[Record]]:
    """Return a model's best learning rate, and its finite runs at that rate."""
    best = best_learning_rate(runs, score, smallest)
    assert best is not None
    return best, [run for run in runs if run["learning_rate"] == best and run["finite"]]


def _title(records: Sequence[Record]) -> str:
    first = records[0]
    origin = [f"from {first['from']}"] if "from" in first else []
    return ", ".join([*origin, *(f"{name} {_plain(value)}" for name, value in first["settings"].items())])


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_table(title: str, *headings: str) -> Table:
    """Return an empty table whose first column is of names, and the others of numbers."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _language(records: list[Record]) -> list[Table]:
    models = by_model(records)
    found = [_models_table(_title(records), models), _rates_table("loss by learning rate", models, "loss", 4)]
    found.append(_positions_table("loss by position", models, lambda run: run["loss_by_position"]))
    parts = [run for run in records if run["finite"] and run.get("loss_by_part")]
    if parts:
        found.append(_positions_table("loss by part of the corpus", by_model(parts), lambda run: run["loss_by_part"]))
    long = [run for run in records if run["finite"] and run.get("long")]
    if long:
        found += [
            _positions_table(
                "loss by position in long stretches", by_model(long), lambda run: run["long"]["by_position"]
            ),
            _positions_table(
                "loss of the same tokens in windows of the length of training",
                by_model(long),
                lambda run: run["long"]["in_windows"],
            ),
            _long_table(by_model(long)),
        ]
    (rows,) = differences(records)
    if rows:
        found.append(_differences_table(rows))
    (zeroed,) = switched_off(records)
    if zeroed:
        found.append(_switched_off_table(zeroed, _errors_over_windows(records)))
    return [*found, _pairs_table(models), _runs_table(records)]


def _long_table(models: dict[str, list[Record]]) -> Table:
    """Tabulate the mean loss of all tokens of the long stretches, read whole and in windows, a seed a value."""
    table = make_table("loss of all tokens of long stretches, by seed", "model", "whole", "in windows", "difference")
    for name, runs in models.items():
        pairs = [(run["long"]["all"], run["long"]["all_in_windows"]) for run in runs]
        columns = zip(*((whole, windows, windows - whole) for whole, windows in pairs), strict=True)
        table.add_row(name, *(" ".join(f"{value:.4f}" for value in column) for column in columns))
    return table


def paired(runs: Iterable[Record], others: Iterable[Record]) -> list[float]:
    """Return the loss of runs less that of others with the same seed and learning rate."""
    found = {(run["learning_rate"], run["seed"]): run["loss"] for run in others if run["finite"]}
    pairs = [((run["learning_rate"], run["seed"]), run["loss"]) for run in runs if run["finite"]]
    return [loss - found[key] for key, loss in pairs if key in found]


def _pairs_table(models: dict[str, list[Record]]) -> Table:
    """Tabulate the loss of each model (row) less that of each other one (column), paired by seed."""
    table = make_table("difference of loss, row less column, paired by seed and learning rate", "model", *models)
    for name, runs in models.items():
        gaps = ([] if name == other else paired(runs, models[other]) for other in models)
        table.add_row(name, *(average(values, signed=True) for values in gaps))
    return table


def _runs_table(records: list[Record]) -> Table:
    """Tabulate every run with what is needed to make it again."""
    table = make_table(
        "runs",
        *("model", "seed", "optimiser", "lr of AdamW", "lr of Muon", "loss", "tokens", "corpus", "commit"),
    )
    for run in sorted(records, key=lambda run: (run["model"], run["learning_rate"], run["seed"])):
        ratio, rate = run["settings"].get("muon_ratio"), run["learning_rate"]
        of_muon = "-" if ratio is None else f"{ratio * rate:.3g}"
        loss = f"{run['loss']:.4f}" if run["finite"] else "not finite"
        row = [run["model"], str(run["seed"]), "AdamW" if ratio is None else "Muon", f"{rate:.3g}", of_muon, loss]
        table.add_row(*row, *(_plain(run.get(name, "-")) for name in ("tokens", "corpus_sha256", "commit")))
    return table


def _models_table(title: str, models: dict[str, list[Record]]) -> Table:
    headings = (
        "model",
        "best lr",
        "seeds",
        "loss (nats)",
        "best in the run",
        "bits per byte",
        "parameters",
        "state KB",
    )
    table = make_table(title, *headings, "tokens/s", "not finite")
    rows = []
    for name, runs in models.items():
        best, kept = _at_best(runs, "loss", smallest=True)
        failed = sum(not run["finite"] for run in runs)
        losses, bests, bits = ([run[key] for run in kept] for key in ("loss", "best_loss", "bits_per_byte"))
        row = [name, f"{best:.3g}", str(len(kept)), average(losses), average(bests), average(bits)]
        row += [f"{runs[0]['parameters']:,}", f"{runs[0]['state_bytes'] / 1024:,.1f}"]
        row += [f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}", f"{failed} of {len(runs)}"]
        rows.append((statistics.mean(losses) if losses else math.inf, row))
    for _, row in sorted(rows, key=lambda pair: pair[0]):
        table.add_row(*row)
    return table


def _rates_table(title: str, models: dict[str, list[Record]], score: str, digits: int) -> Table:
    rates = sorted({run["learning_rate"] for runs in models.values() for run in runs})
    table = make_table(title, "model", *(f"{rate:.3g}" for rate in rates))
    for name, runs in models.items():
        cells = []
        for rate in rates:
            there = [run for run in runs if run["learning_rate"] == rate]
            failed = sum(not run["finite"] for run in there)
            cell = average([run[score] for run in there if run["finite"]], digits)
            cells.append(f"{cell} ({failed} not finite)" if failed else cell)
        table.add_row(name, *cells)
    return table


def _positions_table(
    title: str, models: dict[str, list[Record]], positions: Callable[[Record], dict[str, float]]
) -> Table:
    """Tabulate the means over the seeds at each model's best learning rate."""
    kept = {name: _at_best(runs, "loss", smallest=True)[1] for name, runs in models.items()}
    kept = {name: runs for name, runs in kept.items() if runs}
    buckets = list(dict.fromkeys(bucket for runs in kept.values() for run in runs for bucket in positions(run)))
    table = make_table(title, "model", *buckets)
    for name, runs in kept.items():
        table.add_row(name, *(average([positions(run)[bucket] for run in runs]) for bucket in buckets))
    return table


def _differences_table(rows: Sequence[Row]) -> Table:
    table = make_table(
        "variants of Phase 2: difference of loss to phase2, paired by seed and learning rate; above 0 the change costs",
        *("model", "pairs", "difference (nats)", "standard errors"),
    )
    for name, gaps in rows:
        error = standard_error(gaps)
        ratio = f"{statistics.mean(gaps) / error:+.1f}" if error else "-"
        table.add_row(name, str(len(gaps)), average(gaps, signed=True), ratio)
    return table


def _switched_off_table(rows: Sequence[Row], errors: dict[str, float]) -> Table:
    table = make_table(
        "cost of a mechanism put to zero after training, ± over seeds, or over windows of one seed",
        *("model", "mechanism", "seeds", "difference (nats)"),
    )
    for row in rows:
        model, mechanism = row.name.split(": ")
        cell = average(row.values, 5, signed=True)
        if len(row.values) == 1 and row.name in errors:
            cell += f" ± {errors[row.name]:.5f}"
        table.add_row(model, mechanism, str(len(row.values)), cell)
    return table


def _errors_over_windows(records: Sequence[Record]) -> dict[str, float]:
    """Return the standard error over windows of what each mechanism costs, by ``model: mechanism``."""
    return {
        f"{run['model']}: {mechanism}": error
        for run in records
        for mechanism, (_, error) in (run.get("switched_off") or {}).items()
        if error is not None
    }


def _recall(records: list[Record]) -> list[Table]:
    models = by_model(records)
    table = make_table(_title(records), "model", "best lr", "seeds", "state KB", "mean", *records[0]["accuracies"])
    for name, runs in models.items():
        best, kept = _at_best(runs, "accuracy", smallest=False)
        row = [name, f"{best:.3g}", str(len(kept)), f"{runs[0]['state_bytes'] / 1024:,.1f}"]
        row.append(average([run["accuracy"] for run in kept], 3))
        row += [average([run["accuracies"][part] for run in kept], 3) for part in records[0]["accuracies"]]
        table.add_row(*row)
    return [table, _rates_table("accuracy by learning rate", models, "accuracy", 3)]


def _tracking(records: list[Record]) -> list[Table]:
    """Return a table of accuracies by length: the median over the seeds, and every seed."""
    lengths = list(records[0]["accuracies"])
    table = make_table(
        _title(records), "model", "lr", "seeds", "not finite", *(f"{length}: median" for length in lengths)
    )
    for length in lengths:
        table.add_column(f"{length}: seeds", justify="right")
    for name, of in sorted(by_model(records).items()):
        for rate in sorted({run["learning_rate"] for run in of}):
            runs = sorted((run for run in of if run["learning_rate"] == rate), key=lambda run: run["seed"])
            scores = [[run["accuracies"][length] for run in runs] for length in lengths]
            row = [name, f"{rate:.3g}", str(len(runs)), str(sum(not run["finite"] for run in runs))]
            row += [f"{statistics.median(values):.3f}" for values in scores]
            table.add_row(*row, *(" ".join(f"{value:.3f}" for value in values) for values in scores))
    return [table]


class Recalled(NamedTuple):
    """Accuracies of a model of a size at its best learning rate, over seeds."""

    name: str
    kilobytes: float
    accuracies: list[float]
    width: int
    heads: int


def recalls(records: Sequence[Record]) -> list[Recalled]:
    """Return a row for every model and size, in the order of names and sizes."""
    rows = []
    for runs in by_setting(_of_task(records, "mqar")):
        for name, of in by_model(runs).items():
            _, kept = _at_best(of, "accuracy", smallest=False)
            if kept:
                size, accuracies = kept[0]["settings"], [run["accuracy"] for run in kept]
                rows.append(Recalled(name, kept[0]["state_bytes"] / 1024, accuracies, size["width"], size["heads"]))
    return sorted(rows, key=lambda row: (row.name, row.kilobytes))


def _recall_curve(records: list[Record]) -> Table:
    """Tabulate accuracy against the size of the state: a line for every model and size."""
    table = make_table(
        "recall by state bytes, each at its best learning rate", "model", "state KB", "accuracy", "width", "heads"
    )
    for name, kilobytes, accuracies, width, heads in recalls(records):
        table.add_row(name, f"{kilobytes:,.1f}", average(accuracies, 3), str(width), str(heads))
    return table


class Needle(NamedTuple):
    """Recall of a model at its best learning rate.

    Attributes:
        name: of the model.
        seeds: that stayed finite.
        exact: by distance, the part of the answers that is exact and its standard error: over seeds, or over samples
            where there is one seed.
        nats: by distance, of an answer, for every seed where they are finite.
    """

    name: str
    seeds: int
    exact: dict[int, tuple[float, float]]
    nats: dict[int, list[float]]


def needles(records: Sequence[Record]) -> list[list[Needle]]:
    """Return the recall of every model, for each setting."""
    found = []
    for runs in by_setting(_of_task(records, "needle")):
        best = [(name, _at_best(of, "loss", smallest=True)[1]) for name, of in by_model(runs).items()]
        found.append([_needle_of(name, kept) for name, kept in best if kept])
    return found


def _needle_of(name: str, runs: list[Record]) -> Needle:
    exact, nats = {}, {}
    for distance in runs[0]["needle"]:
        scores = [run["needle"][distance] for run in runs]
        shares = [score["exact"] for score in scores]
        error = standard_error(shares) if len(shares) > 1 else scores[0]["exact_error"] or 0.0
        exact[int(distance)] = statistics.mean(shares), error
        nats[int(distance)] = [score["nats"] for score in scores if score["nats"] is not None]
    return Needle(name, len(runs), exact, nats)


def _needle(records: list[Record]) -> list[Table]:
    models, (rows,) = by_model(records), needles(records)
    found = [_models_table(_title(records), models), _rates_table("loss by learning rate", models, "loss", 4)]
    distances = [f"{distance:,}" for distance in (rows[0].exact if rows else ())]
    exact = make_table(
        "exact answers in percent by distance, ± over seeds, or over samples of one seed", "model", "seeds", *distances
    )
    nats = make_table("nats of an answer by distance", "model", "seeds", *distances)
    for row in rows:
        shares = (f"{100 * share:.1f} ± {100 * error:.1f}" for share, error in row.exact.values())
        exact.add_row(row.name, str(row.seeds), *shares)
        nats.add_row(row.name, str(row.seeds), *(average(values, 2) for values in row.nats.values()))
    return [*found, exact, nats, *(table for runs in models.values() for table in _needle_without(runs))]


def _needle_without(runs: list[Record]) -> list[Table]:
    """Return a table of answers with a mechanism switched off after training, seed by seed."""
    runs = [run for run in _at_best(runs, "loss", smallest=True)[1] if run.get("needle_without")]
    if not runs:
        return []
    distances = list(next(iter(runs[0]["needle_without"].values())))
    table = make_table(
        f"{runs[0]['model']}: exact answers in percent by distance, a mechanism switched off after training, by seed",
        *("without", *(f"{int(distance):,}" for distance in distances)),
    )
    scores = [{"-": run["needle"], **run["needle_without"]} for run in runs]
    for name in scores[0]:
        shares = ([score[name][distance]["exact"] for score in scores] for distance in distances)
        table.add_row(name, *(", ".join(f"{100 * share:.1f}" for share in of) for of in shares))
    return [table]


_TABLES: dict[str, Callable[[list[Record]], list[Table]]] = {
    "language": _language,
    "mqar": _recall,
    "needle": _needle,
    "tracking": _tracking,
}
