"""The report's figures, as SVG files whose bytes depend on the numbers only.

One visual language throughout: a variant keeps its color, a variant that failed its audit is dashed
and hollow, a small point is one seed, a line or a bar is the mean over seeds, and what variants
share is black. Few variants have Okabe & Ito's palette, told apart with any color vision; many have
shades in their order, as suits a sweep.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fairway.audit.interface import FAIL
from fairway.files import atomic_path
from fairway.report.format import compact, signed
from fairway.report.quantization import ROUNDED, quantized_runs
from fairway.report.results import FEW_VARIANTS, Results
from fairway.report.tables import (
    ALL_ADAPTERS,
    RunTables,
    batch_reach_tokens,
    furthest_change,
    reach_counts,
    stage_bpb,
)
from fairway.report.token_sums import TEXT_PARTS, gain_nats

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#1f2933", "#5f6b7a", "#d9dee5"
WIDTH_INCHES = 5.2
"""Text of 9 points stays readable where the page is 400 pixels wide; so panels stand one under the
other."""
NAME_CHARACTERS = 26
"""A longer name of a variant goes on over several lines."""
LEGEND_LINE_INCHES = 0.17
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
NO_DATE = {"Date": None, "Creator": None}
BUDGET_PANELS = {
    "artifact_bytes": ("Artifact with code", "MB", 1e6),
    "training_seconds": ("Training", "s", 1.0),
    "evaluation_seconds": ("Evaluation", "s", 1.0),
}


def write_figures(folder: Path, results: Results, tables: RunTables) -> dict[str, Path]:
    """Draw every figure into `folder` as SVG; return the paths by name."""
    drawings: dict[str, Callable[[], Figure]] = {
        "bpb_by_stage": lambda: bpb_by_stage(results),
        "training_curves": lambda: training_curves(results),
        "layers": lambda: layers(results),
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
                draw().savefig(temporary, format="svg", transparent=True, metadata=NO_DATE)
    return paths


def bpb_by_stage(results: Results) -> Figure:
    """val_bpb after each stage: seeds as points, their mean as a line, one line per variant."""
    order = results.score_stages
    many = not results.has_few_variants
    figure, (axes,) = _new_figure(3.6 + many * LEGEND_LINE_INCHES * len(results.variants))
    values = {variant: _bpb(results, variant) for variant in results.variants}
    for sharers in results.stages_by_sharers():
        here = [
            at for at, stage in enumerate(order) if results.sharers(sharers[0], stage) == sharers
        ]
        if len(here):
            first = max(here[0] - 1, 0)  # drawn on from the stage before
            line = values[sharers[0]][first : here[-1] + 1]
            style = _style(results, sharers[0]) if len(sharers) == 1 else {"color": INK}
            _line_with_points(axes, range(first, here[-1] + 1), line, skip=here[0] - first, **style)
    ends = [values[variant][-1].mean() for variant in results.variants]
    labels = [_final_label(results, *one) for one in zip(results.variants, ends, strict=True)]
    axes.set_xticks(range(len(order)), order, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.3, len(order) - 0.7 if many else len(order) + 1.6)
    axes.set_ylabel("val_bpb, lower is better")
    axes.margins(y=0.12)
    colors = [_color(results, variant) for variant in results.variants]
    if many:
        failed = [results.failed(variant) for variant in results.variants]
        best_first = np.lexsort([ends, failed])
        handles = [Patch(color=colors[index]) for index in best_first]
        _legend_below(figure, handles, [labels[index] for index in best_first])
    else:
        _label_ends(axes, len(order) - 1 + 0.15, ends, labels, colors)
    return figure


def training_curves(results: Results) -> Figure:
    """Training loss over tokens for each training run and seed, above the learning-rate scale."""
    figure, (loss, rate) = _new_figure(2.8, 0.9, sharex=True)
    runs = dict.fromkeys(results.sharers(variant, "train") for variant in results.variants)
    for sharers in runs:
        curves = [results.curves[sharers[0], seed] for seed in results.seeds]
        last = np.mean([curve["loss"].iloc[-1] for curve in curves])
        for index, (seed, curve) in enumerate(zip(results.seeds, curves, strict=True)):
            label = f"seed {seed}: {curve['loss'].iloc[-1]:.3f} at the last step"
            color = PALETTE[index % len(PALETTE)]
            if len(runs) > 1:
                color = _color(results, sharers[0])
                name = _wrapped(results.name_of(sharers, "train"))
                label = f"{name}: {last:.3f} at the last step" if index == 0 else None
            style = {"color": color, "linewidth": 1.1, "alpha": 0.85}
            loss.plot(curve["tokens"] / 1e6, curve["loss"], label=label, **style)
            rate.plot(curve["tokens"] / 1e6, curve["lr_scale"], **style)
    loss.set_ylabel("training loss (nats per token)")
    loss.legend(loc="upper right", ncols=1 if len(runs) <= 4 else 2, fontsize=8.5)
    rate.set_ylabel("lr scale")
    rate.set_ylim(0, 1.08)
    rate.set_xlabel("tokens seen (millions)")
    rate.set_xlim(left=0)
    return figure


def layers(results: Results) -> Figure:
    """Error and bits of every quantized matrix, one line per run of gptq, mean over seeds."""
    runs = quantized_runs(results)
    many = len(runs) > FEW_VARIANTS
    figure, (error, spent) = _new_figure(
        2.4, 2.2 + many * LEGEND_LINE_INCHES * len(runs), sharex=True
    )
    keys = list(dict.fromkeys(key for table in runs.values() for key in table.index))
    banks = pd.Series([bank for bank, _ in keys], dtype=str)
    for sharers, table in runs.items():
        color = INK if len(sharers) > 1 else _color(results, sharers[0])
        rows = table.reindex(keys)
        for index, at in enumerate(banks.groupby(banks, sort=False).groups.values()):
            label = results.name_of(sharers, "gptq") if index == 0 else None
            style = {"color": color, "linewidth": 1.3, "markersize": 3}
            error.plot(at, rows["error"].iloc[at], "o-", label=label, **style)
            spent.plot(at, rows["bits_per_code"].iloc[at], "o-", **style)
            if ROUNDED in rows:
                error.plot(at, rows[ROUNDED].iloc[at], "_", **(style | {"markersize": 6}))
    for axes in (error, spent):
        for at in np.flatnonzero(banks.ne(banks.shift()))[1:]:
            axes.axvline(at - 0.5, color="#9aa5b1", linewidth=0.7)
    error.set_yscale("log")
    error.set_ylabel("error")
    if many:
        _legend_below(figure, *error.get_legend_handles_labels())
    elif len(runs) > 1:
        error.legend(fontsize=8)
    spent.set_ylabel("bits a code")
    centers = [np.mean(at) for at in banks.groupby(banks, sort=False).groups.values()]
    names = [name.removesuffix("_bank").replace("_", "\n") for name in dict.fromkeys(banks)]
    spent.set_xticks(centers, names, fontsize=8.5)
    spent.tick_params(axis="x", length=0)
    return figure


def gain_by_position(results: Results, gains: pd.DataFrame) -> Figure:
    """Nats per token that adaptation saves, by position in the document and in the text.

    A panel of each per variant, each variant on its own scale: an honest gain is a hundred times
    smaller than a leak, and would be invisible beside it. Of many variants there are two of each:
    those that failed their audit, and the others.
    """
    if results.has_few_variants:
        rows = [[variant] for variant in results.variants]
    else:
        split = [
            [v for v in results.variants if results.failed(v) == fails] for fails in (False, True)
        ]
        rows = [row for row in split if row]
    below = 0.0 if results.has_few_variants else LEGEND_LINE_INCHES * len(results.variants)
    figure, panels = _new_figure(*[2.3] * len(rows), *[1.7 + below / len(rows)] * len(rows))
    documents, texts = panels[: len(rows)], panels[len(rows) :]
    for document, text, row in zip(documents, texts, rows, strict=True):
        for variant in row:
            own = gains[gains["variant"] == variant]
            _draw_document_gains(document, results, variant, own)
            parts = [results.tokens[variant, seed].by_text_part for seed in results.seeds]
            by_part = _aligned([gain_nats(part) for part in parts])
            percent = (by_part.index.to_numpy() + 0.5) * 100 / TEXT_PARTS
            _line_with_points(text, percent, by_part.to_numpy(), **_style(results, variant))
        if results.has_few_variants:
            document.set_title(_name(results, row[0]))
            text.set_title(_name(results, row[0]))
        if results.has_few_variants:
            document.legend(loc="best", fontsize=8.5)
        for axes in (document, text):
            axes.set_ylabel("gain (nats a token)")
            _zero_line(axes)
        _label_bins(document, gains)
        text.set_xlabel("position in the validation text (%)")
    if not results.has_few_variants:
        known = [axes.get_legend_handles_labels() for axes in documents]
        _legend_below(figure, *map(sum, zip(*known, strict=True), ([], [])))
    return figure


def leak(results: Results) -> Figure:
    """Gain of targets in their own delta's loss and of the others; reach of the flips."""
    few = results.has_few_variants
    figure, (gain, reach) = _new_figure(2.8, 2.8 if few else 3.4 + 0.25 * len(results.variants))
    groups = {True: "in the loss of\ntheir own delta", False: "not in\nthat loss"}
    width = 0.8 / len(results.variants)
    for index, variant in enumerate(results.variants):
        offset = (index - (len(results.variants) - 1) / 2) * width
        sums = [results.tokens[variant, seed].by_own_loss for seed in results.seeds]
        gains = _aligned([gain_nats(one) for one in sums]).reindex(list(groups)).to_numpy()
        _bars_with_points(gain, np.arange(2) + offset, gains, width * 0.9, results, variant)
    gain.set_xticks(range(2), groups.values())
    gain.set_xlim(-0.6, 1.6)
    gain.margins(y=0.16 if few else 0.3)
    gain.set_title("Who gains")
    gain.set_ylabel("gain of adaptation (nats per token)")
    _zero_line(gain)
    tables = {variant: reach_counts(results, variant) for variant in results.variants}
    _draw_reach(reach, results, tables)
    handles = [Patch(color=_color(results, variant)) for variant in tables]
    labels = [_reach_label(*one) for one in tables.items()]
    if few:
        reach.legend(handles, labels, loc="upper right")
    else:
        _legend_below(figure, handles, labels)
    return figure


def budgets_used(results: Results, budgets: pd.DataFrame) -> Figure:
    """Bytes and seconds of every variant against the limits."""
    figure, panels = _new_figure(*[0.6 + 0.3 * len(results.variants)] * 3)
    for axes, (budget, (title, unit, scale)) in zip(panels, BUDGET_PANELS.items(), strict=True):
        rows = budgets[budgets["budget"] == budget].groupby("variant")[["used", "limit"]].max()
        rows = rows.loc[list(results.variants)] / scale
        most = rows.to_numpy().max()
        for index, (variant, used, limit) in enumerate(rows.itertuples()):
            axes.barh(index, used, 0.5, color=_color(results, variant))
            share = f"{used:,.3g} {unit} ({used / limit:.1%})"
            axes.text(used + most * 0.03, index, share, va="center", fontsize=8.5)
            axes.plot([limit, limit], [index - 0.5, index + 0.5], color=INK, linewidth=1.4)
        limits = rows["limit"].unique()
        words = "limit {0:,.4g} {1}" if len(limits) == 1 else "{0:,.4g}"
        axes.set_xlim(0, most * 1.12)
        axes.set_xticks(limits, [words.format(limit, unit) for limit in limits])
        axes.set_title(title)
        axes.grid(False)
        axes.set_yticks(range(len(results.variants)), map(_wrapped, results.variants))
        axes.invert_yaxis()
    return figure


def stage_times(results: Results) -> Figure:
    """Wall-clock seconds of every stage: the mean over seeds as a bar, the seeds as points."""
    rows = [
        (sharers, stage)
        for sharers, stages in results.stages_by_sharers().items()
        for stage in stages
    ]
    few = len(rows) <= 24
    figure, (axes,) = _new_figure(0.8 + (0.3 if few else 0.19) * len(rows))
    size = 8.5 if few else 7.5
    for index, (sharers, stage) in enumerate(rows):
        seconds = [results.metrics[sharers[0], seed, stage]["seconds"] for seed in results.seeds]
        color = MUTED if len(sharers) > 1 else _color(results, sharers[0])
        axes.barh(index, np.mean(seconds), 0.62, color=color, alpha=0.85)
        axes.plot(seconds, np.full(len(seconds), index), ".", color=INK, markersize=4)
        text = f"  {np.mean(seconds):,.1f} s"
        axes.text(max(seconds), index, text, va="center", fontsize=size)
    labels = [f"{stage}, {results.name_of(sharers, stage)}" for sharers, stage in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=size)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of the stage, on this machine")
    return figure


def _new_figure(*heights: float, sharex: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels one under the other, and the panels. heights: of each, inches."""
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), 1, height_ratios=heights, sharex=sharex, squeeze=False)
    return figure, grid[:, 0]


def _legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """For many names, a line each."""
    figure.legend(handles, labels, loc="outside lower left", fontsize=8)


def _color(results: Results, variant: str) -> str:
    index, known = results.variants.index(variant), len(results.variants)
    if known <= len(PALETTE):
        return PALETTE[index]
    return to_hex(matplotlib.colormaps["viridis"](0.88 * index / (known - 1)))


def _adapter_color(results: Results, adapter: str) -> str:
    """One of the palette that no variant has, as long as they last."""
    known = sorted({name for variant in results.variants for name in results.adapters(variant)})
    return PALETTE[(len(results.variants) + known.index(adapter)) % len(PALETTE)]


def _wrapped(name: str) -> str:
    return textwrap.fill(name, NAME_CHARACTERS)


def _name(results: Results, variant: str) -> str:
    return f"{variant} (failed audit)" if results.failed(variant) else variant


def _style(results: Results, variant: str) -> dict:
    return {"color": _color(results, variant), "failed": results.failed(variant)}


def _aligned(series: list[pd.Series]) -> pd.DataFrame:
    """Groups as rows, seeds as columns; a group that a seed lacks is NaN."""
    return pd.concat(series, axis=1).sort_index()


def _bpb(results: Results, variant: str) -> np.ndarray:
    """float64 [score stages, seeds]."""
    return np.array(
        [
            [stage_bpb(results, variant, seed, stage) for seed in results.seeds]
            for stage in results.score_stages
        ]
    )


def _final_label(results: Results, variant: str, bpb: float) -> str:
    verdict = results.verdict(variant)
    name = _wrapped(variant) if results.has_few_variants else variant
    between = "\n" if results.has_few_variants else ", "
    if verdict == FAIL:
        return f"{name}{between}not a valid score"
    return f"{name} {bpb:.4f}{between}audit {verdict}"


def _line_with_points(
    axes: Axes,
    x: Sequence[float],
    values: np.ndarray,
    color: str,
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
    axes.plot(x, values.mean(axis=1), color=color, linewidth=1.8, linestyle=dashes, label=label)
    face = "white" if failed else color
    marks = {"color": color, "markerfacecolor": face, "markersize": points, "alpha": 0.8}
    for column in values.T:
        axes.plot(x[skip:], column[skip:], "o", **marks)


def _bars_with_points(
    axes: Axes, x: np.ndarray, values: np.ndarray, width: float, results: Results, variant: str
) -> None:
    """values [bars, seeds]: their mean as a bar and each as a point; NaN draws nothing."""
    color, few = _color(results, variant), results.has_few_variants
    hollow = {"facecolor": "white", "hatch": "////", "edgecolor": color}
    means = values.mean(axis=1)
    axes.bar(x, means, width, **(hollow if results.failed(variant) else {"color": color}))
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
            color=color,
            fontsize=8.5 if few else 7,
            rotation=0 if few else 90,
        )


def _zero_line(axes: Axes) -> None:
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)


def _label_ends(
    axes: Axes, x: float, ends: Sequence[float], labels: Sequence[str], colors: Sequence[str]
) -> None:
    """Write each line's label at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    lines = max(label.count("\n") + 1 for label in labels)
    gap = (high - low) * 0.23 * lines / axes.figure.get_figheight()
    height = -np.inf
    for index in np.argsort(ends, kind="stable"):
        height = max(ends[index], height + gap)
        axes.text(x, height, labels[index], color=colors[index], va="center", fontsize=9)


def _draw_document_gains(axes: Axes, results: Results, variant: str, gains: pd.DataFrame) -> None:
    """One curve in all and, of few variants, one per adapter, over the bins of distance."""
    style, titles = _style(results, variant), results.adapters(variant)
    whole = "".join(titles.values()) if len(titles) == 1 else "in all"
    curves = {ALL_ADAPTERS: whole if results.has_few_variants else _name(results, variant)}
    if results.has_few_variants and len(titles) > 1:
        curves = titles | curves
    for name, label in curves.items():
        rows = gains[gains["adapter"] == name]
        values = rows.pivot(index="first_token", columns="seed", values="gain_nats")
        own = {"color": _adapter_color(results, name), "points": 2.5} if name in titles else {}
        _line_with_points(axes, range(len(values)), values.to_numpy(), label=label, **style | own)


def _label_bins(axes: Axes, gains: pd.DataFrame) -> None:
    """The bins' first distances and, under them, their numbers of targets: alike for all curves."""
    tokens = gains.groupby("first_token")["tokens"].first()
    second = tokens.index[1] if len(tokens) > 1 else 0
    starts = [f"{compact(start, 1024)}" if start else f"<{second}" for start in tokens.index]
    labels = [f"{start}\n{compact(n)}" for start, n in zip(starts, tokens, strict=True)]
    axes.set_xticks(range(len(tokens)), labels, fontsize=8.5)
    axes.set_xlabel("tokens since the document began; below, targets in the bin")


def _draw_reach(axes: Axes, results: Results, tables: dict[str, pd.DataFrame]) -> None:
    """Histogram of how far back a replaced token changed a distribution, per variant."""
    axes.set_title("How far back a replaced token is felt")
    axes.set_xlabel("distance back (tokens)")
    axes.set_ylabel("distributions changed (%)")
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
        color = _color(results, variant)
        filled = percent.any()
        axes.stairs(percent, edges, color=color, fill=filled, alpha=0.75 if filled else 1.0)
        if not filled:
            axes.plot(edges[[0, -1]], [0, 0], color=color, linewidth=3, clip_on=False)
        batch = batch_reach_tokens(results, variant)
        if batch is not None and batch <= edges[-1]:
            axes.axvline(batch, ymax=0.72, color=color, linewidth=1.2, linestyle="dotted")
            axes.annotate(
                f"shared by\na batch: {batch:,}",
                (batch, 0.6),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                color=color,
                fontsize=8.5,
            )
    axes.set_xlim(edges[0] - 0.5, edges[-1])
    axes.set_ylim(0, max(axes.get_ylim()[1] * 1.3, 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])


def _reach_label(variant: str, table: pd.DataFrame) -> str:
    furthest = furthest_change(table)
    return f"{variant}: " + (f"up to {furthest:,} tokens back" if furthest else "never")
