"""Tables that compare runs of different settings: optimisers, sizes, and differences to one model bucket by bucket."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.table import Table

from experiments.quality.report import average, by_model, left_out, make_table, paired, parted
from experiments.quality.results import Record, best_learning_rate, setting
from experiments.quality.variants import parse_variant

_SIZES = ("width", "layers", "parameters", "steps", "batch")
_FLOPS_PER_PARAMETER = 6
_PLACED = re.compile(r"phase2(/(hybrid|one|attention|at(-\d+)+)(/window-(all|\d+))?)?")
_EVERYWHERE, _NOWHERE = "phase2/attention", "phase2"


def tables(records: Sequence[Record], base: str | None = None) -> list[Table]:
    """Return the tables of optimisers, of parts that are left out in training, of attention's places, and of sizes.

    Args:
        records: runs of any tasks.
        base: model whose losses by position and part are subtracted from those of the others; None for no such table.

    Raises:
        ValueError: there are no runs of the base.
    """
    runs = _of_language(records)
    found = [_optimiser_table(of) for of in _grouped(runs, ("muon_ratio",)) if len(_optimisers(of)) > 1]
    for of in _grouped(runs, ()):
        found += [_left_out_table(of)] if any(left_out(of)) else []
        found += [_places_table(of)] if sum(bool(blocks) for blocks, _ in places(of).values()) > 1 else []
    found += [_scaling_table(points) for points in scaling(runs)]
    return found + ([] if base is None else _difference_tables(runs, base))


def optimiser(run: Record) -> tuple[str, float]:
    """Return the name of a run's optimiser, and the learning rate of its matrices."""
    ratio, rate = run["settings"].get("muon_ratio"), run["learning_rate"]
    return ("AdamW", rate) if ratio is None else ("Muon", ratio * rate)


class Point(NamedTuple):
    """Losses of the models of one size.

    Attributes:
        parameters: that the models aim at.
        tokens: of a run.
        losses: over seeds, by model, each at its best learning rate.
    """

    parameters: int
    tokens: int
    losses: dict[str, list[float]]

    @property
    def flops(self) -> float:
        """FLOPs of a run: six per parameter and token; what attention computes over its window is not counted."""
        return float(_FLOPS_PER_PARAMETER * self.parameters * self.tokens)


def scaling(records: Sequence[Record]) -> list[list[Point]]:
    """Return the points of every scaling line: sizes that learn from the same text with the same optimiser."""
    found = []
    for runs in _grouped(_of_language(records), _SIZES):
        points = [_point(of) for of in _grouped(runs, ())]
        if len({point.parameters for point in points}) > 1:
            found.append(sorted(points, key=lambda point: (point.parameters, point.tokens)))
    return found


def _point(runs: Sequence[Record]) -> Point:
    settings = runs[0]["settings"]
    losses = {}
    for name, of in by_model(runs).items():
        losses[name] = _losses_at_best(of)
    return Point(settings["parameters"], settings["steps"] * settings["batch"] * settings["length"], losses)


def _losses_at_best(runs: Sequence[Record]) -> list[float]:
    best = best_learning_rate(runs, "loss", smallest=True)
    return [run["loss"] for run in runs if run["learning_rate"] == best and run["finite"]]


def _scaling_table(points: Sequence[Point]) -> Table:
    models = list(dict.fromkeys(name for point in points for name in point.losses))
    table = make_table("loss by size, same text and optimiser", "parameters", "tokens", "FLOPs", *models)
    for point in points:
        cells = (average(point.losses.get(name, [])) for name in models)
        table.add_row(f"{point.parameters:,}", f"{point.tokens:,}", f"{point.flops:.2g}", *cells)
    return table


def _optimisers(runs: Iterable[Record]) -> list[tuple[str, float]]:
    return sorted({optimiser(run) for run in runs})


def _optimiser_table(runs: Sequence[Record]) -> Table:
    """Tabulate the loss by optimiser and learning rate, and what Muon gains, each optimiser at its best rate."""
    columns = _optimisers(runs)
    headings = (f"{name} {rate:.3g}" for name, rate in columns)
    table = make_table("loss by optimiser and learning rate of matrices", "model", *headings, "Muon less AdamW")
    for name, of in by_model(runs).items():
        cells = [
            average([run["loss"] for run in of if optimiser(run) == column and run["finite"]]) for column in columns
        ]
        table.add_row(name, *cells, average(muon_gain(of), signed=True))
    return table


def muon_gain(runs: Sequence[Record]) -> list[float]:
    """Return the loss of one model with Muon less that with AdamW, each at its best rate, paired by seed."""
    losses: dict[str, dict[int, float]] = {}
    for name in ("Muon", "AdamW"):
        of = [run for run in runs if optimiser(run)[0] == name and run["finite"]]
        means = {
            rate: statistics.mean(run["loss"] for run in of if optimiser(run)[1] == rate) for _, rate in _optimisers(of)
        }
        best = min(means, key=means.__getitem__, default=None)
        losses[name] = {run["seed"]: run["loss"] for run in of if optimiser(run)[1] == best}
    return [loss - losses["AdamW"][seed] for seed, loss in losses["Muon"].items() if seed in losses["AdamW"]]


def _left_out_table(runs: Sequence[Record]) -> Table:
    """Tabulate, for runs of one setting, what each part (row) costs each model (column) that was trained without it."""
    (rows,) = left_out(runs)
    bases, parts = (list(dict.fromkeys(parted(row.name)[i] for row in rows)) for i in (0, 1))
    costs = {parted(row.name): row.values for row in rows}
    table = make_table(
        "cost of a part left out in training, paired by seed and learning rate (number of pairs)", "part", *bases
    )
    for part in parts:
        table.add_row(part, *(average(costs.get((base, part), []), signed=True, counted=True) for base in bases))
    return table


def places(runs: Sequence[Record]) -> dict[str, tuple[tuple[int, ...], float]]:
    """Return the blocks that attend, counted from 1, and their window, for each model that differs in these alone.

    The runs are of one setting; models with fewer such blocks come first, and smaller windows.
    """
    found = {}
    for name, of in by_model(runs).items():
        if _PLACED.fullmatch(name):
            config = parse_variant(name).at(of[0]["settings"]["layers"], of[0]["settings"]["length"]).config
            blocks = tuple(block + 1 for block in config.get("attention_layers", ()))
            found[name] = blocks, config.get("attention_window") or math.inf
    return dict(sorted(found.items(), key=lambda item: (len(item[1][0]), item[1])))


def _places_table(runs: Sequence[Record]) -> Table:
    models = by_model(runs)
    last = list(next(run["loss_by_position"] for run in runs if run["finite"]))[-1]
    headings = ("loss", f"less {_NOWHERE}", f"less {_EVERYWHERE}", f"less {_EVERYWHERE}, {last}")
    table = make_table(
        "attention by blocks and window, at the best learning rate; differences paired by seed and learning rate",
        *("blocks", "window", "seeds", "state KB", *headings),
    )
    for name, (blocks, window) in places(runs).items():
        of, losses = models[name], _losses_at_best(models[name])
        nowhere, everywhere = (models.get(base, []) if base != name else [] for base in (_NOWHERE, _EVERYWHERE))
        gaps = [paired(of, nowhere), paired(of, everywhere)]
        gaps.append(paired_buckets(of, everywhere, lambda run: run["loss_by_position"]).get(last, []))
        attended = ("all" if math.isinf(window) else f"{window:,}") if blocks else "-"
        row = [", ".join(map(str, blocks)) or "-", attended, str(len(losses)), f"{of[0]['state_bytes'] / 1024:,.0f}"]
        table.add_row(*row, average(losses), *(average(values, signed=True) for values in gaps))
    return table


def _difference_tables(runs: Sequence[Record], base: str) -> list[Table]:
    """Tabulate, per setting that holds the base, the loss of every model less that of the base in each bucket."""
    if all(run["model"] != base for run in runs):
        raise ValueError(f"there are no runs of {base!r}; known are {', '.join(by_model(runs))}")
    found = []
    for of in _grouped(runs, ()):
        models = by_model(of)
        if base in models and len(models) > 1:
            found.append(_bucket_table(models, base, "position", lambda run: run["loss_by_position"]))
            if any(run.get("loss_by_part") for run in models[base]):
                found.append(
                    _bucket_table(models, base, "part of the corpus", lambda run: run.get("loss_by_part") or {})
                )
    return found


def _bucket_table(
    models: dict[str, list[Record]], base: str, kind: str, buckets_of: Callable[[Record], dict[str, float]]
) -> Table:
    gaps = {name: paired_buckets(of, models[base], buckets_of) for name, of in models.items() if name != base}
    buckets = list(dict.fromkeys(bucket for of in gaps.values() for bucket in of))
    table = make_table(f"loss less that of {base} by {kind}, paired by seed and learning rate", "model", *buckets)
    for name, of in gaps.items():
        table.add_row(name, *(average(of.get(bucket, []), signed=True) for bucket in buckets))
    return table


def paired_buckets(
    runs: Sequence[Record], others: Sequence[Record], buckets_of: Callable[[Record], dict[str, float]]
) -> dict[str, list[float]]:
    """Return the values of runs less those of others with the same seed and learning rate, by bucket."""
    known = {(run["learning_rate"], run["seed"]): buckets_of(run) for run in others if run["finite"]}
    gaps: dict[str, list[float]] = {}
    for run in runs:
        other = known.get((run["learning_rate"], run["seed"]), {}) if run["finite"] else {}
        for bucket, value in (buckets_of(run) if other else {}).items():
            gaps.setdefault(bucket, []).append(value - other[bucket])
    return gaps


def _of_language(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["settings"]["task"] == "language"]


def _grouped(records: Iterable[Record], free: Sequence[str]) -> list[list[Record]]:
    """Return the runs whose settings agree in all but the ``free`` ones."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        kept = {name: value for name, value in record["settings"].items() if name not in free}
        groups.setdefault(json.dumps(setting(record | {"settings": kept})), []).append(record)
    return list(groups.values())
