"""Plots of runs: losses, also by position, window and size, costs of what is left out, recall by state and distance."""

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

from experiments.quality.across import scaling, window_gaps
from experiments.quality.report import (
    Row,
    by_model,
    by_setting,
    left_out,
    losses,
    needles,
    parted,
    positions,
    recalls,
    standard_error,
    switched_off,
)
from experiments.quality.results import Record

_OURS, _OTHERS = "#d55e00", "#0072b2"  # distinct for colour-blind readers, too
_LOOKS = {
    "phase2": ("#d55e00", "o"),
    "phase2/hybrid/window-512": ("#009e73", "^"),
    "phase2/attention": ("#cc79a7", "s"),
    "transformer": ("#0072b2", "X"),
    "gated-deltanet": ("#56b4e9", "D"),
}
"""Colours and markers, the same in all panels."""
_WINDOWS = ("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")
_PANEL = (5.0, 3.8)  # inches
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
        _positions(records, long=False),
        _mechanisms(records),
        _windows(records),
        _switched_off(records),
        _scaling(records),
        _positions(records, long=True),
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
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "runs", "axes.facecolor": _PAPER, "font.size": 11, **ink}):
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
    rows = max(losses(_repeated(records)), key=len, default=[])
    return (lambda axes: _dots(axes, rows, "held-out loss, nats per token")) if rows else None


def _repeated(records: Sequence[Record]) -> list[Record]:
    """Leave out models with one seed where others of the same setting have more."""
    kept = []
    for runs in by_setting(records):
        seeds = {name: len({run["seed"] for run in of}) for name, of in by_model(runs).items()}
        kept += [run for run in runs if seeds[run["model"]] > 1 or max(seeds.values()) == 1]
    return kept


def _mechanisms(records: Sequence[Record]) -> Draw | None:
    """Draw the setting with the most parts, and as a band how far seeds of a whole model are apart."""
    found = zip(left_out(records), losses(records), strict=True)
    rows, whole = max(found, key=lambda pair: len(pair[0]), default=([], []))
    parts = [(parted(row.name)[1], parted(row.name)[0], row.values) for row in rows]
    bases = {base for _, base, _ in parts}
    spread = max((max(row.values) - min(row.values) for row in whole if row.name in bases), default=0.0)

    def draw(axes: Axes) -> None:
        _marks(axes, parts, "cost of leaving it out in training, nats")
        axes.set_xscale("symlog", linthresh=0.01)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axvspan(-spread, spread, color="#808080", alpha=0.25, linewidth=0)

    return draw if rows else None


def _switched_off(records: Sequence[Record]) -> Draw | None:
    """Draw the setting with the most rows, its smallest costs on a linear scale."""
    found = max(switched_off(records), key=len, default=[])
    parts = []
    for row in found:
        model, mechanism = row.name.split(": ")
        parts += [(mechanism, model, row.values)] if any(row.values) else []

    def draw(axes: Axes) -> None:
        _marks(axes, parts, "cost of zeroing it after training, nats")
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.1)

    return draw if parts else None


def _positions(records: Sequence[Record], long: bool) -> Draw | None:
    """Draw the setting with the most models."""
    found = max(positions(_repeated(records), long), key=len, default={})

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


def _windows(records: Sequence[Record]) -> Draw | None:
    """Draw hybrids of several windows less attention in every block; longer training sequences are dashed."""
    found = window_gaps(records)
    windows = sorted({gap.window for gap in found})
    shortest = min((gap.length for gap in found), default=0)

    def draw(axes: Axes) -> None:
        for gap in found:
            number = windows.index(gap.window)
            look = dict(color=_WINDOWS[number % len(_WINDOWS)], marker="ox^sDv"[number % 6])
            dashed = {} if gap.length == shortest else {"linestyle": "--", "markerfacecolor": "none"}
            label = f"{gap.window:,.0f}" + f" of {gap.length:,}" * bool(dashed)
            axes.plot(list(gap.gaps), list(gap.gaps.values()), label=label, **look, **dashed)
        axes.axhline(0.0, color=_INK, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens read")
        axes.set_ylabel("nats above attention everywhere")
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=low - 0.5 * (high - low))  # below the curves is the legend
        title = f"window, of a training sequence of {shortest:,} or as said"
        axes.legend(frameon=False, fontsize="small", title=title, title_fontsize="small", loc="lower right", ncols=3)

    return draw if len(found) > 1 else None


def _scaling(records: Sequence[Record]) -> Draw | None:
    """Draw the scaling line with the most sizes."""
    points = max(scaling(records), key=len, default=[])
    models = list(dict.fromkeys(name for point in points for name in point.losses))

    def draw(axes: Axes) -> None:
        for i, name in enumerate(models):
            line = [(point.flops, statistics.mean(of)) for point in points if (of := point.losses.get(name))]
            axes.plot(*zip(*line, strict=True), label=_whole_name(name), **_look(name, i))
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs of training: 6 per parameter and token")
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
            beside = [1.06**i * distance for distance in row.exact]  # equal shares would hide each other
            axes.errorbar(beside, shares, yerr=errors, label=label, capsize=3, **_look(row.name, i))
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("tokens between fact and question")
        axes.set_ylabel("exact answers")
        axes.legend(frameon=False)

    return draw if rows else None


def _colour(model: str) -> str:
    return _OURS if model.startswith("phase2") else _OTHERS


def _look(model: str, number: int) -> dict[str, Any]:
    colour, marker = _LOOKS.get(model, (_colour(model), "ox^sDv"[number % 6]))
    return dict(color=colour, marker=marker)


def _dots(axes: Axes, rows: Sequence[Row], label: str) -> None:
    """Draw a row for every name, the smallest mean on top."""
    rows = sorted(rows, key=lambda row: statistics.mean(row.values), reverse=True)
    for height, row in enumerate(rows):
        mean, error = statistics.mean(row.values), standard_error(row.values)
        axes.errorbar(mean, height, xerr=error, linestyle="", capsize=3, **_look(row.name, 0))
    axes.set_yticks(range(len(rows)), [_whole_name(row.name) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)


def _marks(axes: Axes, found: Sequence[tuple[str, str, list[float]]], label: str) -> None:
    """Draw a row for every part, the largest mean on top, with a mark for each model: (part, model, values)."""
    largest: dict[str, float] = {}
    for part, _, values in found:
        largest[part] = max(largest.get(part, -math.inf), statistics.mean(values))
    parts = sorted(largest, key=largest.__getitem__)
    for i, model in enumerate(dict.fromkeys(model for _, model, _ in found)):
        of = [(values, parts.index(part)) for part, name, values in found if name == model]
        means, errors = [statistics.mean(values) for values, _ in of], [standard_error(values) for values, _ in of]
        heights = [height for _, height in of]
        label_of = _whole_name(model).partition(",")[0]
        axes.errorbar(means, heights, xerr=errors, linestyle="", capsize=3, label=label_of, **_look(model, i))
    axes.set_yticks(range(len(parts)), [_PARTS.get(part, part.replace("-", " ")) for part in parts])
    axes.set_ylim(-0.6, len(parts) - 0.4)
    axes.axvline(0.0, color=_INK, linewidth=1)
    axes.set_xlabel(label)
    axes.legend(frameon=False, fontsize="small", loc="lower right")


_NAMES = {
    "phase2": "pure Phase 2",
    "phase2/hybrid/window-512": "hybrid, window 512",
    "phase2/attention": "attention, our parts",
    "gated-deltanet": "Gated DeltaNet",
    "gated-deltanet/hybrid/window-512": "Gated DeltaNet hybrid, window 512",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
    "gla": "GLA",
    "transformer": "Transformer",
}
_PARTS = {
    "bare": "all of them",
    "bk": "BK-Core",
    "conv": "convolution",
    "feedback": "memory feedback",
    "kappa": "Γ in the Hamiltonian",
    "norm": "norm of the read-out",
    "positions": "zeta positions",
    "qk-norm": "L2 norm of q and k",
    "snr": "SNR filter",
    "zeta-init": "zeta initialisation",
}


def _whole_name(model: str) -> str:
    """Return the name of a model with all parts of its variant."""
    base, *parts = model.split("/")
    return _NAMES.get(model) or ", ".join([_NAMES.get(base, base.replace("-", " ")), *parts])
