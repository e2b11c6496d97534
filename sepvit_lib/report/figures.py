"""Charts of reports. They are legible on black and on white."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from sepvit_lib.inference.fonts import use_in_figures

SHADES = LinearSegmentedColormap.from_list("shades", [(0.18, 0.5, 0.82, 0.0), (0.18, 0.5, 0.82, 1.0)])
MAX_NAME = 18  # characters of a class name


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, C × C: rows are labels, columns predictions. Colours are shares of the rows."""
    names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in classes]
    use_in_figures(names)
    side, shares = 1.6 + 0.34 * max(len(names), 4), counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        style: dict[str, Any] = dict(color="white") if shares[row, column] > 0.5 else {}
        axes.text(column, row, str(count or ""), ha="center", va="center", fontsize=8 if count < 1000 else 6, **style)
    axes.set(xlabel="prediction", ylabel="label")
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(len(names)), names)
    return figure


def unit_curves(
    curves: Mapping[str, Sequence[np.ndarray] | np.ndarray], line: Sequence[tuple[float, float]], x: str, y: str
) -> Figure:
    """Draw curves in the unit square.

    Args:
        curves: coordinates of the points, by label of the curve.
        line: two points of a dashed line, for comparison.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    figure = Figure(figsize=(4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*line), "--", color="#888888", linewidth=1)
    for name, points in curves.items():
        axes.plot(*points, ".-" if len(points[0]) < 30 else "-", label=name)
    axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.grid(alpha=0.25)
    axes.legend()
    return figure
