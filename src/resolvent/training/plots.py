"""Pictures of a run, by matplotlib, which is an optional extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from resolvent.evaluation.plots import COLOURS, check_plot, save_figure


class Curve(NamedTuple):
    """A curve of a panel.

    Attributes:
        x: places.
        y: values.
        label: its name in the legend.
        style: line and marks, as matplotlib abbreviates them.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str | None = None
    style: str = "-"


def draw(path: Path, axis: str, panels: Mapping[str, Sequence[Curve]], *, log: bool = False) -> None:
    """Draw panels above one another, by the label of their vertical axis.

    Args:
        path: the picture, .png, .pdf or .svg.
        axis: label of the horizontal axis that all panels share.
        panels: their curves.
        log: draw the horizontal axis logarithmically.

    Raises:
        ConfigError: matplotlib is not installed, or the name of the file has another ending.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2.2 * len(panels)), layout="constrained")
    columns = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves) in zip(columns, panels.items(), strict=True):
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.plot(curve.x, curve.y, curve.style, color=colour, linewidth=1, markersize=4, label=curve.label)
        if any(curve.label for curve in curves):
            axes.legend(frameon=False)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    if log:
        columns[-1].set_xscale("log")
    columns[-1].set_xlabel(axis)
    save_figure(figure, path)
