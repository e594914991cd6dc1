"""Plots of measurements, by matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resolvent.errors import ConfigError
from resolvent.evaluation.influence import Influences
from resolvent.evaluation.needle import NeedleScores
from resolvent.evaluation.positions import PositionScores
from resolvent.evaluation.statistics import Bucket, Estimate
from resolvent.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # distinct for colour-blind readers, too
_MARKS = ("o", "x", "^")
_LINES = ("-", "--", ":")  # both of two equal curves stay visible


def check_format(path: Path) -> None:
    """Check that the name of a plot's file ends in one of the formats.

    Raises:
        ConfigError: the name has another ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def check_plot(path: Path) -> None:
    """Check, before anything is measured, that a plot can be drawn.

    Raises:
        ConfigError: matplotlib is not installed, or the name of the file ends in none of the formats.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"drawing {path} needs matplotlib ({error}): pip install 'resolvent[plots]'") from error
    check_format(path)


def plot_positions(scores: PositionScores, path: Path) -> None:
    """Plot the loss by position, with the carried state and in windows, and the gain of the carried state."""
    rows = scores.rows
    centres = _centres([row.bucket for row in rows])
    figure = _figure(2, "tokens read before", scores.training_length)
    above, below = figure.axes
    _curve(above, centres, [row.loss for row in rows], "everything read before", 0)
    _curve(above, centres, [row.windows_loss for row in rows], f"windows of {scores.training_length:,}", 1)
    _curve(below, centres, [row.gain for row in rows], None, 2)
    below.axhline(0, color="0.3", linewidth=1)
    _finish(figure, ["loss (nats per token)", "gain (nats per token)"], path)


def plot_needle(scores: NeedleScores, path: Path) -> None:
    """Plot recall by distance, and its level by chance."""
    rows, centres = scores.rows, [row.distance for row in scores.rows]
    figure = _figure(1, "tokens between fact and question", scores.training_length)
    (axes,) = figure.axes
    _curve(axes, centres, [row.first for row in rows], f"ranked first of {scores.candidates}", 0)
    _curve(axes, centres, [row.beaten for row in rows], "candidates beaten", 1)
    _curve(axes, centres, [row.exact for row in rows], "written exactly", 2)
    for chance, colour in ((scores.chance, COLOURS[0]), (0.5, COLOURS[1])):
        axes.axhline(chance, color=colour, linewidth=0.5)
    axes.set_ylim(-0.03, 1.03)
    _finish(figure, ["share (thin: by chance)"], path)


def plot_influence(influences: Influences, path: Path) -> None:
    """Plot gradient and divergence by distance on logarithmic axes."""
    rows = influences.rows
    centres = _centres([row.bucket for row in rows])
    figure = _figure(2, "tokens before the predicted one", influences.training_length)
    above, below = figure.axes
    _curve(above, centres, [row.gradient for row in rows], None, 0)
    _curve(below, centres, [row.divergence for row in rows], None, 1)
    for axes in figure.axes:
        axes.set_yscale("log", nonpositive="mask")
    _finish(figure, ["gradient norm", "divergence if replaced (nats)"], path)


def _centres(buckets: Sequence[Bucket]) -> list[float]:
    """Return the middle of every bucket on a logarithmic axis."""
    return [float(np.sqrt(bucket.first * bucket.last)) for bucket in buckets]


def _figure(panels: int, label: str, training_length: int) -> Figure:
    """Return stacked panels over a logarithmic axis of tokens, with a mark at the training length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 3 * panels), layout="constrained")
    columns = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axes in columns:
        axes.set_xscale("log", base=2)
        axes.axvline(training_length, color="0.6", linewidth=1, label=f"training length {training_length:,}")
        axes.grid(alpha=0.25)
    columns[-1].set_xlabel(label)
    return figure


def _curve(axes: Axes, centres: Sequence[float], estimates: Sequence[Estimate], label: str | None, style: int) -> None:
    """Draw means with one standard error on either side."""
    means = [estimate.mean for estimate in estimates]
    errors = [estimate.standard_error or 0.0 for estimate in estimates]
    look = dict(color=COLOURS[style], marker=_MARKS[style], linestyle=_LINES[style], markersize=4, capsize=2)
    axes.errorbar(centres, means, errors, label=label, **look)


def _finish(figure: Figure, labels: Sequence[str], path: Path) -> None:
    for axes, label in zip(figure.axes, labels, strict=True):
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the name of the file ends in."""
    with atomic_output(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
