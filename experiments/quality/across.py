"""Tables that compare runs of different settings: optimisers, sizes, and differences to one model bucket by bucket."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
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
        base: model whose losses by position, part and size are subtracted from those of the others; None for no such
            table.

    Raises:
        ValueError: there are no runs of the base.
    """
    runs = _of_language(records)
    found = []
    for of in _grouped(runs, ("muon_ratio",)):
        found += [_optimiser_table(of), _best_table(of)] if len(_optimisers(of)) > 1 else []
    for of in _grouped(runs, ()):
        found += [_left_out_table(of)] if any(left_out(of)) else []
        found += [_places_table(of)] if sum(bool(blocks) for blocks, _ in places(of).values()) > 1 else []
    found += [_scaling_table(points) for points in scaling(runs)]
    return found if base is None else [*found, *_difference_tables(runs, base), *_lead_tables(runs, base)]


class Optimiser(NamedTuple):
    """Optimiser of a run.

    Attributes:
        name: of the optimiser of the matrices.
        matrices: learning rate of the matrices.
        rest: learning rate of AdamW for all else.
    """

    name: str
    matrices: float
    rest: float

    def __str__(self) -> str:
        rest = "" if self.name == "AdamW" else f", rest {self.rest:.3g}"
        return f"{self.name} {self.matrices:.3g}{rest}"


def optimiser(run: Record) -> Optimiser:
    """Return the optimiser of a run."""
    ratio, rate = run["settings"].get("muon_ratio"), run["learning_rate"]
    return Optimiser("AdamW", rate, rate) if ratio is None else Optimiser("Muon", ratio * rate, rate)


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
    return [[_point(of) for of in line] for line in _lines(_of_language(records))]


def _lines(runs: Sequence[Record]) -> list[list[list[Record]]]:
    """Return the runs of every scaling line, size by size."""
    found = []
    for of in _grouped(runs, _SIZES):
        sizes = sorted(_grouped(of, ()), key=lambda same: _point(same)[:2])
        if len({_point(same).parameters for same in sizes}) > 1:
            found.append(sizes)
    return found


def _point(runs: Sequence[Record]) -> Point:
    settings = runs[0]["settings"]
    losses = {}
    for name, of in by_model(runs).items():
        losses[name] = _losses_at_best(of)
    return Point(settings["parameters"], settings["steps"] * settings["batch"] * settings["length"], losses)


def _lead_tables(runs: Sequence[Record], base: str) -> list[Table]:
    """Tabulate, for every scaling line, the loss of each model less that of the base, and the lead in FLOPs."""
    found = []
    for of in _lines(runs):
        points = [_point(same) for same in of]
        models = [name for name in dict.fromkeys(run["model"] for same in of for run in same) if name != base]
        table = make_table(
            f"loss less that of {base} by size, paired by seed and learning rate; FLOPs that {base} needs for the same "
            "loss, over those of the model (log-linear between neighbouring sizes)",
            *("parameters", *(heading for name in models for heading in (name, "FLOPs"))),
        )
        for point, same in zip(points, of, strict=True):
            kept, cells = by_model(same), []
            for name in models:
                gaps = paired(kept.get(name, []), kept.get(base, []))
                factor = flops_factor(points, point, name, base)
                cells += [average(gaps, signed=True), "-" if factor is None else f"{factor:.2f}"]
            table.add_row(f"{point.parameters:,}", *cells)
        found.append(table)
    return found


def flops_factor(points: Sequence[Point], point: Point, model: str, base: str) -> float | None:
    """Return how many times the FLOPs of a model the base needs for the same loss.

    The base's loss is taken as linear in the logarithm of the FLOPs between neighbouring sizes of its scaling line;
    None where the line does not reach the loss of the model.
    """
    line = [(math.log(at.flops), statistics.mean(at.losses[base])) for at in points if at.losses.get(base)]
    if not point.losses.get(model):
        return None
    loss = statistics.mean(point.losses[model])
    for (flops, above), (more_flops, below) in pairwise(line):
        if below <= loss <= above:
            return math.exp(flops + (above - loss) / (above - below) * (more_flops - flops)) / point.flops
    return None


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


def _optimisers(runs: Iterable[Record]) -> list[Optimiser]:
    return sorted({optimiser(run) for run in runs})


def _by_optimiser(runs: Iterable[Record]) -> dict[Optimiser, dict[int, float]]:
    """Return the losses of the finite runs of one model, by optimiser and seed."""
    losses: dict[Optimiser, dict[int, float]] = {}
    for run in runs:
        if run["finite"]:
            losses.setdefault(optimiser(run), {})[run["seed"]] = run["loss"]
    return losses


def ranked(runs: Sequence[Record]) -> list[tuple[Optimiser, float]]:
    """Return the optimisers of one model with their mean losses, the best first; those with runs that failed come last.

    The means are of the seeds that all optimisers have; where there is none, of all seeds of each.
    """
    failed = {optimiser(run) for run in runs if not run["finite"]}
    losses = _by_optimiser(runs)
    common = set.intersection(*(set(of) for of in losses.values())) if losses else set()
    means = {key: statistics.mean(of[seed] for seed in common or of) for key, of in losses.items()}
    return sorted(means.items(), key=lambda item: (item[0] in failed, item[1]))


def _optimiser_table(runs: Sequence[Record]) -> Table:
    """Tabulate the loss by optimiser, and what Muon gains, of the models that were trained with several."""
    columns = _optimisers(runs)
    table = make_table("loss by optimiser and learning rates", "model", *map(str, columns), "Muon less AdamW")
    for name, of in by_model(runs).items():
        losses = _by_optimiser(of)
        if len(losses) > 1:
            cells = (average(list(losses.get(column, {}).values())) for column in columns)
            table.add_row(name, *cells, average(muon_gain(of), signed=True))
    return table


def _best_table(runs: Sequence[Record]) -> Table:
    """Tabulate every model with its best optimiser and learning rates, and by how much the next ones are worse."""
    table = make_table(
        "each model at its best optimiser and learning rates; more: of the next best, over the seeds that both have",
        *("model", "optimiser", "of matrices", "of the rest", "seeds", "loss", "tried", "next best", "more"),
    )
    rows = []
    for name, of in by_model(runs).items():
        order, losses = ranked(of), _by_optimiser(of)
        if order:
            (best, least), *others = order
            kept = list(losses[best].values())
            next_best = (str(others[0][0]), f"{others[0][1] - least:+.4f}") if others else ("-", "-")
            row = [name, best.name, f"{best.matrices:.3g}", f"{best.rest:.3g}", str(len(kept)), average(kept)]
            rows.append((statistics.mean(kept), [*row, str(len(order)), *next_best]))
    for _, row in sorted(rows):
        table.add_row(*row)
    return table


def muon_gain(runs: Sequence[Record]) -> list[float]:
    """Return the loss of one model with Muon less that with AdamW, each at its best rate, paired by seed."""
    losses: dict[str, dict[int, float]] = {}
    for name in ("Muon", "AdamW"):
        of = _by_optimiser(run for run in runs if optimiser(run).name == name)
        best = min(of, key=lambda key: statistics.mean(of[key].values()), default=None)
        losses[name] = {} if best is None else of[best]
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
        if of:
            table.add_row(name, *(average(of.get(bucket, []), signed=True) for bucket in buckets))
    return table


class WindowGap(NamedTuple):
    """Loss of a hybrid less that of attention in every block, by position.

    Attributes:
        length: tokens of a training sequence.
        window: tokens that every third block attends to.
        gaps: mean difference, paired by seed and learning rate, by the end of a bucket of positions.
    """

    length: int
    window: float
    gaps: dict[int, float]


def window_gaps(records: Sequence[Record]) -> list[WindowGap]:
    """Return the gaps of all windows and training lengths of one corpus and size: of those with the most of them."""
    by_size: dict[str, list[WindowGap]] = {}
    for runs in _grouped(_of_language(records), ()):
        models = by_model(runs)
        size = json.dumps([runs[0]["settings"].get(name) for name in ("corpus", "parameters")])
        for name, (_, window) in places(runs).items():
            if name.startswith("phase2/hybrid/") and _EVERYWHERE in models:
                gaps = paired_buckets(models[name], models[_EVERYWHERE], lambda run: run["loss_by_position"])
                means = {int(bucket.split("-")[1]): statistics.mean(of) for bucket, of in gaps.items()}
                by_size.setdefault(size, []).append(WindowGap(runs[0]["settings"]["length"], window, means))
    return sorted(max(by_size.values(), key=len, default=[]), key=lambda gap: gap[:2])


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
