"""Plots of runs: losses, also by position and size, costs of what is left out, recall by state size and distance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.quality.across import scaling
from experiments.quality.report import Row, left_out, losses, needles, positions, recalls, standard_error, switched_off
from experiments.quality.results import Record

_OURS, _OTHERS = "#d55e00", "#0072b2"  # distinct for colour-blind readers, too
_PANEL = (5.0, 3.6)  # inches
_COLUMNS = 2
_INK, _PAPER = "#010203", "#fdfeff"  # stand for colours that depend on the reader's scheme
_SCHEMES = (
    "<style>svg { --ink: #1f2328; --paper: #ffffff }"
    "@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --paper: #0d1117 } }</style>"
)


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw what the runs allow, panel beside panel; each model at its best learning rate, one standard error beside it.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = (
        _language(records),
        _mechanisms(records),
        _switched_off(records),
        _positions(records, long=False),
        _positions(records, long=True),
        _scaling(records),
        _recall(records),
        _needle(records),
    )
    panels = [panel for panel in drawn if panel is not None]
    if not panels:
        raise ValueError("the files hold no runs of a language, mqar or needle that stayed finite")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    # The same runs give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "runs", "axes.facecolor": _PAPER, **ink}):
        size = _PANEL[0] * columns, _PANEL[1] * rows
        figure = Figure(figsize=size, layout="constrained", facecolor=_PAPER)
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, draw in zip(places, panels, strict=False):
            draw(axes)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".svg":
        _follow_the_scheme(path)


def _follow_the_scheme(path: Path) -> None:
    """Let a picture be dark where the reader's pages are."""
    picture = path.read_text(encoding="utf-8").replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
    path.write_text(picture.replace("<defs>", f"{_SCHEMES}<defs>", 1), encoding="utf-8")


Draw = Callable[[Axes], None]


def _language(records: Sequence[Record]) -> Draw | None:
    """Draw the setting with the most models."""
    rows = max(losses(records), key=len, default=[])
    return (lambda axes: _dots(axes, rows, "held-out loss, nats per token")) if rows else None


def _mechanisms(records: Sequence[Record]) -> Draw | None:
    rows = max(left_out(records), key=len, default=[])

    def draw(axes: Axes) -> None:
        _dots(axes, rows, "cost of leaving it out, nats per token")
        axes.axvline(0.0, color=_INK, linewidth=1)

    return draw if rows else None


def _switched_off(records: Sequence[Record]) -> Draw | None:
    """Draw the setting with the most rows, its smallest costs on a linear scale."""
    found = max(switched_off(records), key=len, default=[])
    rows = [row for row in found if any(row.values) and not row.name.startswith("phase2/attention")]

    def name(row: str) -> str:
        model, mechanism = row.split(": ")
        return f"{_name(mechanism)}, {_whole_name(model).partition(',')[0]}"

    def draw(axes: Axes) -> None:
        _dots(axes, rows, "cost of zeroing it, nats per token", name)
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.margins(x=0.1)
        axes.axvline(0.0, color=_INK, linewidth=1)

    return draw if rows else None


def _positions(records: Sequence[Record], long: bool) -> Draw | None:
    """Draw the setting with the most models."""
    found = max(positions(records, long), key=len, default={})

    def draw(axes: Axes) -> None:
        for i, (name, means) in enumerate(found.items()):
            model = name.removesuffix(" in windows")
            dashed = {"linestyle": "--"} if name != model else {}
            label = _whole_name(model) + name.removeprefix(model)
            axes.plot(list(means), list(means.values()), label=label, **_look(model, i // (1 + long)), **dashed)
        axes.set_xscale("log", base=8 if long else 2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens of books read" if long else "tokens read")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False, fontsize="small")

    return draw if found else None


def _scaling(records: Sequence[Record]) -> Draw | None:
    """Draw the scaling line with the most sizes."""
    points = max(scaling(records), key=len, default=[])
    models = list(dict.fromkeys(name for point in points for name in point.losses))

    def draw(axes: Axes) -> None:
        for i, name in enumerate(models):
            line = [(point.flops, statistics.mean(of)) for point in points if (of := point.losses.get(name))]
            axes.plot(*zip(*line, strict=True), label=_whole_name(name), **_look(name, i))
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs of training (6 per parameter and token)")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False, fontsize="small")

    return draw if points else None


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
        axes.legend(frameon=False, fontsize="small")

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


def _colour(model: str) -> str:
    return _OURS if model.startswith("phase2") else _OTHERS


def _look(model: str, number: int) -> dict[str, Any]:
    return dict(color=_colour(model), marker="ox^sDv"[number % 6])


def _dots(axes: Axes, rows: Sequence[Row], label: str, name: Callable[[str], str] | None = None) -> None:
    """Draw a row for every name, the smallest mean on top."""
    rows = sorted(rows, key=lambda row: statistics.mean(row.values), reverse=True)
    for height, row in enumerate(rows):
        mean, error = statistics.mean(row.values), standard_error(row.values)
        axes.errorbar(mean, height, xerr=error, fmt="o", color=_colour(row.name), capsize=3)
    axes.set_yticks(range(len(rows)), [(name or _name)(row.name) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)


_NAMES = {
    "phase2": "Phase 2",
    "phase2/bare": "all of them",
    "gated-deltanet": "Gated DeltaNet",
    "gated-deltanet/hybrid/window-512": "Gated DeltaNet hybrid, window 512",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
    "gla": "GLA",
    "transformer": "Transformer",
    "attention": "attention",
    "phase2/no-bk": "BK-Core",
    "phase2/no-kappa": "Γ in the Hamiltonian",
    "phase2/no-snr": "SNR filter",
    "phase2/no-zeta-init": "zeta initialisation",
    "bk": "BK-Core",
    "kappa": "Γ in the Hamiltonian",
    "snr": "SNR filter",
    "phase2/hybrid/window-512": "hybrid, window 512",
    "phase2/attention": "attention, our parts",
    "phase2/attention/no-conv": "attention: convolution",
    "phase2/attention/no-qk-norm": "attention: norm of q and k",
    "phase2/attention/no-norm": "attention: norm of read-out",
    "phase2/attention/no-gate": "attention: gate",
}


def _whole_name(model: str) -> str:
    """Return the name of a model with all parts of its variant; `_name` has the change alone."""
    base, *parts = model.split("/")
    if parts and (model not in _NAMES or "/no-" in model):  # those names are of the parts that are left out
        return ", ".join([_name(base), *parts])
    return _name(model)


def _name(model: str) -> str:
    return _NAMES.get(model, model.removeprefix("phase2/no-").replace("-", " "))
