"""Report of a benchmark: rows, tables and JSON."""

import dataclasses
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resolvent.benchmark.timing import Ceilings, Work
from resolvent.errors import DataError
from resolvent.files import read_json, shown

SMALLER_IS_BETTER = {"ms": True, "GiB": True, "tokens/s": False}
"""Units in which peers are compared."""


@dataclass(frozen=True)
class Target:
    """Target of a figure.

    Attributes:
        goal: the figure to reach.
        least: an acceptable figure; None if only the goal is acceptable.
        at_most: whether these are upper bounds; otherwise they are lower bounds.
    """

    goal: float
    least: float | None = None
    at_most: bool = True

    def verdict(self, figure: float) -> str:
        """Return ``met``, ``will do`` or ``missed``."""
        sign = 1 if self.at_most else -1
        if sign * figure <= sign * self.goal:
            return "met"
        return "will do" if self.least is not None and sign * figure <= sign * self.least else "missed"

    def __str__(self) -> str:
        least = "" if self.least is None else f" ({number(self.least)})"
        return f"{'<=' if self.at_most else '>='} {number(self.goal)}{least}"


@dataclass(frozen=True)
class Row:
    """Figure of ours beside those of peers.

    Attributes:
        section: section of the benchmark.
        name: name of the measurement.
        unit: unit of all figures.
        ours: our figure; None if it could not be measured, with the reason in ``failures``.
        peers: figures of all peers that could be measured.
        target: target of our figure.
        work: least work of a call.
        fraction: least time for that work over our time.
        error: our relative error to a float64 reference, computed before the timing.
        failures: reasons of entries without a figure.
    """

    section: str
    name: str
    unit: str
    ours: float | None
    peers: dict[str, float] = field(default_factory=dict)
    target: Target | None = None
    work: Work | None = None
    fraction: float | None = None
    error: float | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def times_better(self) -> float | None:
        """Factor by which we are better than the best peer; None without peers."""
        if self.ours is None or not self.peers:
            return None
        if SMALLER_IS_BETTER[self.unit]:
            return min(self.peers.values()) / self.ours
        return self.ours / max(self.peers.values())

    @property
    def verdict(self) -> str:
        return "" if self.target is None or self.ours is None else self.target.verdict(self.ours)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"times_better": self.times_better, "verdict": self.verdict}


@dataclass(frozen=True)
class Report:
    """Results of a run.

    Attributes:
        scale: set of sizes: ``cuda``, ``cpu`` or ``quick``.
        device: name of the device.
        ceilings: speed of a large copy and a large product in this run.
        rows: results in order.
        missing: names of the measurements that are not complete, each as ``section: name``; empty after a whole run.
    """

    scale: str
    device: str
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """One line per missing figure."""
        return [f"{row.section}, {row.name}, {who}: {why}" for row in self.rows for who, why in row.failures.items()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "device": self.device,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ceilings": dataclasses.asdict(self.ceilings),
            "failures": self.failures,
            "missing": self.missing,
            "rows": [row.to_dict() for row in self.rows],
        }

    def tables(self) -> list["Table"]:
        """Return a table for every section."""
        sections = dict.fromkeys(row.section for row in self.rows)
        return [_table(section, [row for row in self.rows if row.section == section]) for section in sections]


@dataclass(frozen=True)
class StoredRun:
    """Figures of an earlier run, as ``Report.to_dict`` writes them.

    Attributes:
        scale: its set of sizes.
        device: name of its device.
        torch: version of its PyTorch.
        figures: our figure of every row, by section and name of the row; None where it could not be measured.
    """

    scale: str
    device: str
    torch: str
    figures: dict[tuple[str, str], float | None]

    @classmethod
    def read(cls, path: Path) -> "StoredRun":
        """Read the JSON file of a run.

        Raises:
            CheckpointError: the file cannot be read, or is not JSON.
            DataError: it does not hold the figures of a run.
        """
        values = read_json(path)
        try:
            figures = {(row["section"], row["name"]): row["ours"] for row in values["rows"]}
            if wrong := [x for x in figures.values() if x is not None and type(x) not in (int, float)]:
                raise TypeError(f"{shown(wrong[0])} is no figure")
            return cls(values["scale"], values["device"], values["torch"], figures)
        except (KeyError, TypeError) as fault:
            raise DataError(
                f"{path} does not hold the figures of a benchmark ({fault}): give a file that "
                "`resolvent benchmark --json FILE` wrote"
            ) from fault

    def changes(self, rows: list[Row]) -> "Table":
        """Return a table of our figures in this run and in ``rows``, for all rows of the latter."""
        cells = []
        for row in rows:
            before = self.figures.get((row.section, row.name))
            change = "" if row.ours is None or not before else f"{100 * (row.ours / before - 1):+.1f} %"
            figures = ("" if figure is None else number(figure) for figure in (before, row.ours))
            cells.append([f"{row.section}: {row.name}", row.unit, *figures, change])
        return Table("change", ["", "unit", "stored", "now", "change"], cells)


class Table(NamedTuple):
    """Rows as cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]


_COLUMNS = (
    "",
    "unit",
    "ours",
    "peers",
    "times better",
    "target (will do)",
    "verdict",
    "MB",
    "GFLOP",
    "% of limit",
    "error",
)
TEXT_COLUMNS = ("", "unit", "target (will do)", "verdict")
"""Columns of a table that hold text; the others hold figures."""
STYLES = {"met": "green", "will do": "yellow", "missed": "red", "failed": "red"}
"""Colours of cells by their text."""


def _table(title: str, rows: list[Row]) -> Table:
    """Return the rows of a section as cells, without empty columns."""
    cells = [_cells(row) for row in rows]
    shown = [i for i, header in enumerate(_COLUMNS) if header == "" or any(row[i] for row in cells)]
    return Table(title, [_COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in cells])


def _cells(row: Row) -> list[str]:
    peers = [f"{name} {number(figure)}" for name, figure in row.peers.items()]
    peers += [f"{who} failed" for who in row.failures if who != "ours"]
    work = row.work or Work()
    return [
        row.name,
        row.unit,
        "failed" if row.ours is None else number(row.ours),
        "\n".join(peers),
        "" if row.times_better is None else f"{row.times_better:.2f}",
        "" if row.target is None else str(row.target),
        row.verdict,
        number(work.num_bytes / 1e6) if work.num_bytes else "",
        number(work.flops / 1e9) if work.flops else "",
        "" if row.fraction is None else f"{100 * row.fraction:.0f}",
        "" if row.error is None else f"{row.error:.0e}",
    ]


def number(value: float) -> str:
    """Format a number with three digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
