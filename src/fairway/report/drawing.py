"""What the report's figures have in common: their style, and marks for seeds, means and variants.

One visual language throughout: a variant keeps its colour (Okabe & Ito's palette, told apart with
any colour vision), a variant that failed its audit is dashed and hollow, a small point is one
seed, a line or a bar is the mean over seeds.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairway.report.format import signed
from fairway.report.results import FAIL, Results

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#1f2933", "#5f6b7a", "#d9dee5"
WIDTH_INCHES = 8.2
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa5b1",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "fairway",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def new_figure(columns: int, height: float, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure of one row of panels, and the panels. height: inches."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]


def colour_of(results: Results, variant: str) -> str:
    return PALETTE[results.variants.index(variant) % len(PALETTE)]


def adapter_colour(results: Results, adapter: str) -> str:
    """One of the palette that no variant has, as long as they last."""
    known = sorted({name for variant in results.variants for name in results.adapters(variant)})
    return PALETTE[(len(results.variants) + known.index(adapter)) % len(PALETTE)]


def name_of(results: Results, variant: str) -> str:
    return f"{variant} (failed audit)" if results.verdict(variant) == FAIL else variant


def style_of(results: Results, variant: str) -> dict:
    return {"colour": colour_of(results, variant), "failed": results.verdict(variant) == FAIL}


def aligned(series: list[pd.Series]) -> pd.DataFrame:
    """Groups as rows, seeds as columns; a group that a seed lacks is NaN."""
    return pd.concat(series, axis=1).sort_index()


def line_with_points(
    axes: Axes,
    x: Sequence[float],
    values: np.ndarray,
    colour: str,
    failed: bool = False,
    skip: int = 0,
    label: str | None = None,
    points: float = 4,
) -> None:
    """values [points, seeds]: their mean as a line and each as a point, from row `skip` on.

    points: their diameter, in typographic points.
    """
    x = np.asarray(x, dtype=np.float64)
    dashes = "dashed" if failed else "solid"
    axes.plot(x, values.mean(axis=1), color=colour, linewidth=1.8, linestyle=dashes, label=label)
    for column in values.T:
        face = "white" if failed else colour
        axes.plot(
            x[skip:],
            column[skip:],
            "o",
            color=colour,
            markerfacecolor=face,
            markersize=points,
            alpha=0.8,
        )


def bars_with_points(
    axes: Axes, x: np.ndarray, values: np.ndarray, width: float, results: Results, variant: str
) -> None:
    """values [bars, seeds]: their mean as a bar and each as a point; NaN draws nothing."""
    failed = results.verdict(variant) == FAIL
    colour = colour_of(results, variant)
    face = {"facecolor": "white", "hatch": "////", "edgecolor": colour} if failed else {}
    means = values.mean(axis=1)
    axes.bar(x, means, width, label=name_of(results, variant), **({"color": colour} | face))
    for column in values.T:
        axes.plot(x, column, "o", color=INK, markersize=2.5)
    for where, mean in zip(x, means, strict=True):
        text, tip = ("none", 0.0) if np.isnan(mean) else (signed(mean), mean)
        axes.annotate(
            text,
            (where, tip),
            xytext=(0, 5 if tip >= 0 else -5),
            textcoords="offset points",
            ha="center",
            va="bottom" if tip >= 0 else "top",
            color=colour,
            fontsize=8.5,
        )


def zero_line(axes: Axes) -> None:
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)


def label_ends(
    axes: Axes, x: float, ends: Sequence[float], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Write each line's label at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.115
    height = -np.inf
    for index in np.argsort(ends):
        height = max(ends[index], height + gap)
        axes.text(x, height, labels[index], color=colours[index], va="center", fontsize=9)
