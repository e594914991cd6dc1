"""Plots of runs: losses, gains of mechanisms, and recall against the size of the state and against distance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.quality.report import Row, differences, losses, needles, recalls, standard_error
from experiments.quality.results import Record

_OURS, _OTHERS = "#d55e00", "#0072b2"  # distinct for colour-blind readers, too
_PANEL = (5.0, 3.4)  # inches


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw what the runs allow, panel beside panel; each model at its best learning rate, one standard error beside it.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = (_language(records), _mechanisms(records), _recall(records), _needle(records))
    panels = [panel for panel in drawn if panel is not None]
    if not panels:
        raise ValueError("the files hold no runs of a language, mqar or needle that stayed finite")
    width, height = _PANEL
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "runs"}):  # the same runs give the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


Draw = Callable[[Axes], None]


def _language(records: Sequence[Record]) -> Draw | None:
    """Draw the setting with the most models, without variants of Phase 2."""
    rows = max(losses(records), key=len, default=[])
    return (lambda axes: _dots(axes, rows, "held-out loss, nats per token")) if rows else None


def _mechanisms(records: Sequence[Record]) -> Draw | None:
    rows = max(differences(records), key=len, default=[])

    def draw(axes: Axes) -> None:
        _dots(axes, rows, "cost of leaving it out, nats per token")
        axes.axvline(0.0, color="0.3", linewidth=1)

    return draw if rows else None


def _recall(records: Sequence[Record]) -> Draw | None:
    rows = recalls(records)

    def draw(axes: Axes) -> None:
        for i, name in enumerate(dict.fromkeys(row.name for row in rows)):
            points = [(row.kilobytes, statistics.mean(row.accuracies)) for row in rows if row.name == name]
            axes.plot(*zip(*points, strict=True), label=_whole_name(name), **_look(name, i))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("state, KB")
        axes.set_ylabel("recall (MQAR), accuracy")
        axes.legend(frameon=False)

    return draw if rows else None


def _needle(records: Sequence[Record]) -> Draw | None:
    """Draw the setting with the most models."""
    rows = max(needles(records), key=len, default=[])

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            shares, errors = zip(*row.exact.values(), strict=True)
            label = _whole_name(row.name)
            axes.errorbar(list(row.exact), shares, yerr=errors, label=label, capsize=3, **_look(row.name, i))
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("tokens between fact and question")
        axes.set_ylabel("exact answers")
        axes.legend(frameon=False)

    return draw if rows else None


def _look(model: str, number: int) -> dict[str, Any]:
    return dict(color=_OURS if model.startswith("phase2") else _OTHERS, marker="ox^sDv"[number % 6])


def _dots(axes: Axes, rows: Sequence[Row], label: str) -> None:
    """Draw a row for every name, the smallest mean on top."""
    rows = sorted(rows, key=lambda row: statistics.mean(row.values), reverse=True)
    for height, row in enumerate(rows):
        colour = _OURS if row.name == "phase2" else _OTHERS
        axes.errorbar(
            statistics.mean(row.values), height, xerr=standard_error(row.values), fmt="o", color=colour, capsize=3
        )
    axes.set_yticks(range(len(rows)), [_name(row.name) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)


_NAMES = {
    "phase2": "Phase 2",
    "phase2/bare": "all of them",
    "gated-deltanet": "Gated DeltaNet",
    "mamba2": "Mamba-2",
    "gla": "GLA",
    "transformer": "Transformer",
    "attention": "attention",
    "phase2/no-bk": "BK-Core",
    "phase2/no-kappa": "Γ in the Hamiltonian",
    "phase2/no-snr": "SNR filter",
    "phase2/no-zeta-init": "zeta initialisation",
}


def _whole_name(model: str) -> str:
    """Return the name of a model with all parts of its variant; `_name` has the change alone."""
    return "Phase 2, " + ", ".join(model.split("/")[1:]) if "/" in model else _name(model)


def _name(model: str) -> str:
    return _NAMES.get(model, model.removeprefix("phase2/no-").replace("-", " "))
