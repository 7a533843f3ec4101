"""The report's figures, as SVG files whose bytes depend on the numbers only."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fairway.files import atomic_path
from fairway.report.drawing import (
    INK,
    MUTED,
    PALETTE,
    STYLE,
    WIDTH_INCHES,
    adapter_colour,
    aligned,
    bars_with_points,
    colour_of,
    label_ends,
    line_with_points,
    name_of,
    new_figure,
    style_of,
    zero_line,
)
from fairway.report.format import adapted_by, adapter_name, compact
from fairway.report.results import FAIL, SHARED, SHARED_STAGES, VARIANT_STAGES, Results
from fairway.report.tables import (
    ALL_ADAPTERS,
    STAGES,
    Tables,
    batch_reach_tokens,
    furthest_change,
    reach_counts,
    stage_bpb,
)
from fairway.report.token_sums import STREAM_PARTS, gain_nats

STAGE_LABELS = {
    "train": "train",
    "ema": "EMA",
    "ttt": "TTT",
    "gptq": "GPTQ",
    "sliding": "sliding\nwindow",
    "slot": "adapted",
    "audit": "audit",
}
BUDGET_PANELS = {
    "artifact_bytes": ("Artifact with code", "MB", 1e6),
    "training_seconds": ("Training", "s", 1.0),
    "evaluation_seconds": ("Evaluation", "s", 1.0),
}


def write_figures(folder: Path, results: Results, tables: Tables) -> dict[str, Path]:
    """Draw every figure into `folder` as SVG; return the paths by name."""
    drawings: dict[str, Callable[[], Figure]] = {
        "bpb_by_stage": lambda: bpb_by_stage(results),
        "training_curves": lambda: training_curves(results),
        "gain_by_position": lambda: gain_by_position(results, tables.gains),
        "leak": lambda: leak(results),
        "budgets": lambda: budgets_used(results, tables.budgets),
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
    figure, (axes,) = new_figure(1, height=4.0)
    shared = _bpb(results, SHARED, SHARED_STAGES)
    line_with_points(axes, range(len(SHARED_STAGES)), shared, INK)
    last_shared = len(SHARED_STAGES) - 1
    ends = []
    for variant in results.variants:
        values = _bpb(results, variant, STAGES[len(SHARED_STAGES) :])
        path = np.vstack([shared[-1:], values])
        style = style_of(results, variant)
        line_with_points(axes, range(last_shared, len(STAGES)), path, skip=1, **style)
        ends.append(values[-1].mean())
    labels = [
        _final_label(results, variant, end)
        for variant, end in zip(results.variants, ends, strict=True)
    ]
    axes.set_xticks(range(len(STAGES)), [STAGE_LABELS[stage] for stage in STAGES])
    axes.set_xlim(-0.3, len(STAGES) + 0.55)
    axes.set_ylabel("val_bpb (bits per byte), lower is better")
    axes.margins(y=0.12)
    colours = [colour_of(results, variant) for variant in results.variants]
    label_ends(axes, len(STAGES) - 1 + 0.15, ends, labels, colours)
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


def gain_by_position(results: Results, gains: pd.DataFrame) -> Figure:
    """Nats per token that adaptation saves, by position in the document and in the stream.

    One row of panels per variant, each on its own scale: an honest gain is a hundred times smaller
    than a leak, and would be invisible beside it.
    """
    rows = len(results.variants)
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, sharex="col", sharey="row", squeeze=False, width_ratios=(3, 2))
    for (document, stream), variant in zip(grid, results.variants, strict=True):
        _draw_document_gains(document, results, variant, gains[gains["variant"] == variant])
        by_part = aligned(
            [gain_nats(results.tokens[variant, seed].by_stream_part) for seed in results.seeds]
        )
        percent = (by_part.index.to_numpy() + 0.5) * 100 / STREAM_PARTS
        line_with_points(stream, percent, by_part.to_numpy(), **style_of(results, variant))
        document.set_title(name_of(results, variant))
        document.set_ylabel("gain (nats per token)")
        zero_line(document)
        zero_line(stream)
    _label_bins(document, gains)
    stream.set_xlabel("position in the validation stream (%)")
    return figure


def _draw_document_gains(axes: Axes, results: Results, variant: str, gains: pd.DataFrame) -> None:
    """One curve per adapter and one in all, over the bins of distance; a lone adapter is all."""
    style, adapters = style_of(results, variant), results.adapters(variant)
    curves = {} if len(adapters) == 1 else {name: adapter_name(name) for name in adapters}
    for name in (*curves, ALL_ADAPTERS):
        rows = gains[gains["adapter"] == name]
        values = rows.pivot(index="first_token", columns="seed", values="gain_nats")
        own = {"colour": adapter_colour(results, name), "points": 2.5} if name in curves else {}
        label = curves.get(name) or adapted_by(adapters)
        line_with_points(axes, range(len(values)), values.to_numpy(), label=label, **style | own)
    axes.legend(loc="best", fontsize=8.5)


def _label_bins(axes: Axes, gains: pd.DataFrame) -> None:
    """The bins' first distances and, under them, their numbers of targets: alike for all curves."""
    tokens = gains.groupby("first_token")["tokens"].first()
    second = tokens.index[1] if len(tokens) > 1 else 0
    starts = [f"{compact(start, 1024)}" if start else f"<{second}" for start in tokens.index]
    labels = [f"{start}\n{compact(n)}" for start, n in zip(starts, tokens, strict=True)]
    axes.set_xticks(range(len(tokens)), labels, fontsize=8.5)
    axes.set_xlabel("tokens since the document began; below, targets in the bin")


def leak(results: Results) -> Figure:
    """Gain of targets in their own delta's loss and of the others; reach of the flips."""
    figure, (gain, reach) = new_figure(2, height=3.6)
    groups = {True: "in the loss of\ntheir own delta", False: "not in\nthat loss"}
    width = 0.8 / len(results.variants)
    for index, variant in enumerate(results.variants):
        offset = (index - (len(results.variants) - 1) / 2) * width
        gains = aligned(
            [gain_nats(results.tokens[variant, seed].by_own_loss) for seed in results.seeds]
        ).reindex(list(groups))
        bars_with_points(
            gain, np.arange(2) + offset, gains.to_numpy(), width * 0.9, results, variant
        )
    gain.set_xticks(range(2), groups.values())
    gain.set_xlim(-0.6, 1.6)
    gain.margins(y=0.16)
    gain.set_title("Who gains")
    gain.set_ylabel("gain of adaptation (nats per token)")
    zero_line(gain)
    _draw_reach(reach, results)
    return figure


def budgets_used(results: Results, budgets: pd.DataFrame) -> Figure:
    """Bytes and seconds of every variant against the limits."""
    figure, panels = new_figure(3, height=0.9 + 0.4 * len(results.variants), sharey=True)
    for axes, (budget, (title, unit, scale)) in zip(panels, BUDGET_PANELS.items(), strict=True):
        rows = budgets[budgets["budget"] == budget]
        limit = rows["limit"].iloc[0] / scale
        most = max(rows["used"].max() / scale, limit)
        for index, variant in enumerate(results.variants):
            used = rows.loc[rows["variant"] == variant, "used"].to_numpy() / scale
            axes.barh(index, used.max(), 0.5, color=colour_of(results, variant))
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
    figure, (axes,) = new_figure(1, height=0.8 + 0.3 * len(rows))
    for index, (holder, stage) in enumerate(rows):
        seconds = [results.metrics[holder, seed, stage]["seconds"] for seed in results.seeds]
        colour = MUTED if holder == SHARED else colour_of(results, holder)
        axes.barh(index, np.mean(seconds), 0.62, color=colour, alpha=0.85)
        axes.plot(seconds, np.full(len(seconds), index), ".", color=INK, markersize=4)
        axes.text(max(seconds), index, f"  {np.mean(seconds):,.1f} s", va="center", fontsize=8.5)
    names = STAGE_LABELS | {"slot": "evaluation"}
    labels = [f"{names[stage]}, {holder}" for holder, stage in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of the stage, on this machine")
    return figure


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
        colour = colour_of(results, variant)
        filled = percent.any()
        axes.stairs(percent, edges, color=colour, fill=filled, alpha=0.75 if filled else 1.0)
        if not filled:
            axes.plot(edges[[0, -1]], [0, 0], color=colour, linewidth=3, clip_on=False)
        batch = batch_reach_tokens(results, variant)
        if batch is not None and batch <= edges[-1]:
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
        handles=[Patch(color=colour_of(results, variant)) for variant in results.variants],
        labels=[_reach_label(results, variant, table) for variant, table in tables.items()],
        loc="upper right",
    )
    axes.set_xlim(edges[0] - 0.5, edges[-1])
    axes.set_ylim(0, max(axes.get_ylim()[1] * 1.3, 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])


def _reach_label(results: Results, variant: str, table: pd.DataFrame) -> str:
    furthest = furthest_change(table)
    return f"{variant}: " + (f"up to {furthest:,} tokens back" if furthest else "never")
