"""The report's figures, as SVG files whose bytes depend on the numbers only.

One visual language throughout: a variant keeps its colour (Okabe & Ito's palette, told apart with
any colour vision), a variant that failed its audit is dashed and hollow, a small point is one
seed, a line or a bar is the mean over seeds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fairway.files import atomic_path
from fairway.report.results import FAIL, SHARED, SHARED_STAGES, VARIANT_STAGES, Results
from fairway.report.tables import (
    STAGES,
    batch_reach_tokens,
    furthest_change,
    reach_counts,
    stage_bpb,
)
from fairway.report.token_sums import STREAM_PARTS, gain_nats
from fairway.report.wording import signed

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#1f2933", "#5f6b7a", "#d9dee5"
WIDTH_INCHES = 8.2
STAGE_LABELS = {
    "train": "train",
    "ema": "EMA",
    "ttt": "TTT",
    "gptq": "GPTQ",
    "sliding": "sliding\nwindow",
    "slot": "SLOT",
    "audit": "audit",
}
BUDGET_PANELS = {
    "artifact_bytes": ("Artifact with code", "MB", 1e6),
    "training_seconds": ("Training", "s", 1.0),
    "evaluation_seconds": ("Evaluation", "s", 1.0),
}
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


def write_figures(folder: Path, results: Results, budgets: pd.DataFrame) -> dict[str, Path]:
    """Draw every figure into `folder` as SVG; return the paths by name.

    budgets: the table of `fairway.report.tables.budgets_table`.
    """
    drawings: dict[str, Callable[[], Figure]] = {
        "bpb_by_stage": lambda: bpb_by_stage(results),
        "training_curves": lambda: training_curves(results),
        "gain_by_position": lambda: gain_by_position(results),
        "leak": lambda: leak(results),
        "budgets": lambda: budgets_used(results, budgets),
        "stage_times": lambda: stage_times(results),
    }
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in drawings.items():
            paths[name] = folder / f"{name}.svg"
            with atomic_path(paths[name]) as temporary:
                draw().savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    return paths


def bpb_by_stage(results: Results) -> Figure:
    """val_bpb after each stage: seeds as points, their mean as a line, one line per variant."""
    figure, (axes,) = _figure(1, height=4.0)
    shared = _bpb(results, SHARED, SHARED_STAGES)
    _line_with_points(axes, range(len(SHARED_STAGES)), shared, INK)
    last_shared = len(SHARED_STAGES) - 1
    ends = []
    for variant in results.variants:
        values = _bpb(results, variant, STAGES[len(SHARED_STAGES) :])
        path = np.vstack([shared[-1:], values])
        style = _style(results, variant)
        _line_with_points(axes, range(last_shared, len(STAGES)), path, skip=1, **style)
        ends.append(values[-1].mean())
    labels = [
        _final_label(results, variant, end)
        for variant, end in zip(results.variants, ends, strict=True)
    ]
    axes.set_xticks(range(len(STAGES)), [STAGE_LABELS[stage] for stage in STAGES])
    axes.set_xlim(-0.3, len(STAGES) + 0.55)
    axes.set_ylabel("val_bpb (bits per byte), lower is better")
    axes.margins(y=0.12)
    colours = [_colour(results, variant) for variant in results.variants]
    _label_ends(axes, len(STAGES) - 1 + 0.15, ends, labels, colours)
    return figure


def training_curves(results: Results) -> Figure:
    """Training loss over tokens for each seed, above the learning-rate scale."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.2), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for index, (seed, curve) in enumerate(results.curves.items()):
        colour = PALETTE[index % len(PALETTE)]
        millions = curve["tokens"] / 1e6
        label = f"seed {seed}: {curve['loss'].iloc[-1]:.3f} at the last step"
        loss.plot(millions, curve["loss"], color=colour, linewidth=1.1, alpha=0.85, label=label)
        rate.plot(millions, curve["lr_scale"], color=colour, linewidth=1.1, alpha=0.85)
    loss.set_ylabel("training loss (nats per token)")
    loss.legend(loc="upper right")
    rate.set_ylabel("lr scale")
    rate.set_ylim(0, 1.08)
    rate.set_xlabel("tokens seen (millions)")
    rate.set_xlim(left=0)
    return figure


def gain_by_position(results: Results) -> Figure:
    """Nats per token that SLOT saves, by position in the document and in the stream.

    One row of panels per variant, each on its own scale: an honest gain is a hundred times smaller
    than a leak, and would be invisible beside it.
    """
    rows = len(results.variants)
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, sharex="col", sharey="row", squeeze=False)
    for (document, stream), variant in zip(grid, results.variants, strict=True):
        sums = [results.tokens[variant, seed] for seed in results.seeds]
        style = _style(results, variant)
        by_document = _aligned([gain_nats(one.by_document_position) for one in sums])
        starts = np.maximum(by_document.index.to_numpy(), 8)  # the first bin, 0–15, at 8
        _line_with_points(document, starts, by_document.to_numpy(), **style)
        by_part = _aligned([gain_nats(one.by_stream_part) for one in sums])
        percent = (by_part.index.to_numpy() + 0.5) * 100 / STREAM_PARTS
        _line_with_points(stream, percent, by_part.to_numpy(), **style)
        document.set_title(_name(results, variant))
        document.set_ylabel("gain (nats per token)")
        _zero_line(document)
        _zero_line(stream)
    document.set_xscale("log", base=2)
    document.xaxis.set_major_formatter(lambda value, _: "<16" if value < 16 else f"{value:,.0f}")
    document.set_xlabel("tokens since the document began")
    stream.set_xlabel("position in the validation stream (%)")
    return figure


def leak(results: Results) -> Figure:
    """Gain of targets in their own delta's loss and of the others; reach of the flips."""
    figure, (gain, reach) = _figure(2, height=3.6)
    groups = {True: "in the loss of\ntheir own delta", False: "not in\nthat loss"}
    width = 0.8 / len(results.variants)
    for index, variant in enumerate(results.variants):
        offset = (index - (len(results.variants) - 1) / 2) * width
        gains = _aligned(
            [gain_nats(results.tokens[variant, seed].by_own_loss) for seed in results.seeds]
        ).reindex(list(groups))
        _bars_with_points(
            gain, np.arange(2) + offset, gains.to_numpy(), width * 0.9, results, variant
        )
    gain.set_xticks(range(2), groups.values())
    gain.set_xlim(-0.6, 1.6)
    gain.margins(y=0.16)
    gain.set_title("Who gains")
    gain.set_ylabel("gain of SLOT (nats per token)")
    _zero_line(gain)
    _draw_reach(reach, results)
    return figure


def budgets_used(results: Results, budgets: pd.DataFrame) -> Figure:
    """Bytes and seconds of every variant against the limits."""
    figure, panels = _figure(3, height=0.9 + 0.4 * len(results.variants), sharey=True)
    for axes, (budget, (title, unit, scale)) in zip(panels, BUDGET_PANELS.items(), strict=True):
        rows = budgets[budgets["budget"] == budget]
        limit = rows["limit"].iloc[0] / scale
        most = max(rows["used"].max() / scale, limit)
        for index, variant in enumerate(results.variants):
            used = rows.loc[rows["variant"] == variant, "used"].to_numpy() / scale
            axes.barh(index, used.max(), 0.5, color=_colour(results, variant))
            share = f"{used.max():,.3g} {unit} ({used.max() / limit:.1%})"
            axes.text(used.max() + most * 0.03, index, share, va="center", fontsize=8.5)
        axes.axvline(limit, color=INK, linewidth=1.4)
        axes.set_xlim(0, most * 1.12)
        axes.set_xticks([limit], [f"limit {limit:,.4g} {unit}"])
        axes.set_title(title)
        axes.grid(False)
    panels[0].set_yticks(range(len(results.variants)), results.variants)
    panels[0].invert_yaxis()
    return figure


def stage_times(results: Results) -> Figure:
    """Wall-clock seconds of every stage: the mean over seeds as a bar, the seeds as points."""
    rows = [(SHARED, stage) for stage in SHARED_STAGES]
    rows += [(variant, stage) for variant in results.variants for stage in VARIANT_STAGES]
    figure, (axes,) = _figure(1, height=0.8 + 0.3 * len(rows))
    for index, (holder, stage) in enumerate(rows):
        seconds = [results.metrics[holder, seed, stage]["seconds"] for seed in results.seeds]
        colour = MUTED if holder == SHARED else _colour(results, holder)
        axes.barh(index, np.mean(seconds), 0.62, color=colour, alpha=0.85)
        axes.plot(seconds, np.full(len(seconds), index), ".", color=INK, markersize=4)
        axes.text(max(seconds), index, f"  {np.mean(seconds):,.1f} s", va="center", fontsize=8.5)
    labels = [f"{STAGE_LABELS[stage]}, {holder}" for holder, stage in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of the stage, on this machine")
    return figure


def _figure(columns: int, height: float, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]


def _colour(results: Results, variant: str) -> str:
    return PALETTE[results.variants.index(variant) % len(PALETTE)]


def _name(results: Results, variant: str) -> str:
    return f"{variant} (failed audit)" if results.verdict(variant) == FAIL else variant


def _style(results: Results, variant: str) -> dict:
    return {"colour": _colour(results, variant), "failed": results.verdict(variant) == FAIL}


def _final_label(results: Results, variant: str, bpb: float) -> str:
    verdict = results.verdict(variant)
    if verdict == FAIL:
        return f"{variant}\nnot a valid score"
    return f"{variant} {bpb:.4f}\naudit {verdict}"


def _bpb(results: Results, holder: str, stages: Sequence[str]) -> np.ndarray:
    """float64 [stages, seeds]."""
    return np.array(
        [[stage_bpb(results, holder, seed, stage) for seed in results.seeds] for stage in stages]
    )


def _aligned(series: list[pd.Series]) -> pd.DataFrame:
    """Groups as rows, seeds as columns; a group that a seed lacks is NaN."""
    return pd.concat(series, axis=1).sort_index()


def _line_with_points(
    axes: Axes,
    x: Sequence[float],
    values: np.ndarray,
    colour: str,
    failed: bool = False,
    skip: int = 0,
    label: str | None = None,
) -> None:
    """values [points, seeds]: their mean as a line and each as a point, from row `skip` on."""
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
            markersize=4,
            alpha=0.8,
        )


def _bars_with_points(
    axes: Axes, x: np.ndarray, values: np.ndarray, width: float, results: Results, variant: str
) -> None:
    """values [bars, seeds]: their mean as a bar and each as a point; NaN draws nothing."""
    failed = results.verdict(variant) == FAIL
    colour = _colour(results, variant)
    face = {"facecolor": "white", "hatch": "////", "edgecolor": colour} if failed else {}
    means = values.mean(axis=1)
    axes.bar(x, means, width, label=_name(results, variant), **({"color": colour} | face))
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


def _draw_reach(axes: Axes, results: Results) -> None:
    """Histogram of how far back a replaced token changed a distribution, per variant."""
    axes.set_title("How far back a replaced token is felt")
    axes.set_xlabel("distance back (tokens)")
    axes.set_ylabel("distributions changed (%)")
    tables = {variant: reach_counts(results, variant) for variant in results.variants}
    furthest = max(furthest_change(table) for table in tables.values())
    if furthest == 0:
        axes.text(
            0.5, 0.5, "no earlier distribution changed", transform=axes.transAxes, ha="center"
        )
    edges = np.unique(np.linspace(1, max(furthest, 1) * 1.15 + 2, 41).astype(int))
    for variant, table in tables.items():
        bins = np.searchsorted(edges, table["distance_tokens"].to_numpy(), side="right") - 1
        counts = table.groupby(bins)[["changed", "pairs"]].sum().reindex(range(len(edges) - 1))
        percent = (100 * counts["changed"] / counts["pairs"]).fillna(0).to_numpy()
        colour = _colour(results, variant)
        filled = percent.any()
        axes.stairs(percent, edges, color=colour, fill=filled, alpha=0.75 if filled else 1.0)
        if not filled:
            axes.plot(edges[[0, -1]], [0, 0], color=colour, linewidth=3, clip_on=False)
        batch = batch_reach_tokens(results, variant)
        if batch is not None:
            axes.axvline(batch, ymax=0.72, color=colour, linewidth=1.2, linestyle="dotted")
            axes.annotate(
                f"shared by\na batch: {batch:,}",
                (batch, 0.6),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                color=colour,
                fontsize=8.5,
            )
    axes.legend(
        handles=[Patch(color=_colour(results, variant)) for variant in results.variants],
        labels=[_reach_label(results, variant, table) for variant, table in tables.items()],
        loc="upper right",
    )
    axes.set_xlim(edges[0] - 0.5, edges[-1])
    axes.set_ylim(0, max(axes.get_ylim()[1] * 1.3, 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])


def _reach_label(results: Results, variant: str, table: pd.DataFrame) -> str:
    furthest = furthest_change(table)
    return f"{variant}: " + (f"up to {furthest:,} tokens back" if furthest else "never")


def _zero_line(axes: Axes) -> None:
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)


def _label_ends(
    axes: Axes, x: float, ends: Sequence[float], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Write each line's label at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.115
    height = -np.inf
    for index in np.argsort(ends):
        height = max(ends[index], height + gap)
        axes.text(x, height, labels[index], color=colours[index], va="center", fontsize=9)
