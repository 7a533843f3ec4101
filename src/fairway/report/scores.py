"""The report's tables of scores: of each variant, stage, seed and adapter, and between variants.

A final score only ever stands in a row that carries its audit's verdict, and where that failed it
is struck out and said to be no valid score. A change is negative where it is better, a gain
positive.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fairway.report.format import (
    NONE,
    bits,
    count,
    decimals,
    interval,
    joined,
    mean_and_std,
    probability,
    signed,
)
from fairway.report.origin import file_link
from fairway.report.results import FINAL_STAGE, SLIDING, Results
from fairway.report.settings import ReportSettings
from fairway.report.statistics import describe, least_p, paired_test
from fairway.report.table import Cell, Group, Row, Table
from fairway.report.tables import (
    TEST_FIELDS,
    RunTables,
    gain_bpb,
    gain_per_token,
    references,
    scores_by_adapter,
    stage_bpb,
)
from fairway.stages import STAGES

INVALID = "not a valid score"
TAINTED = "saw validation text"
MOST_SEEDS_BESIDE = 5
"""Scores of so many seeds stand under their mean."""


def seed_heads(results: Results) -> list[str]:
    return [f"#Seed {seed}" for seed in results.seeds]


def named(results: Results, variant: str) -> Cell:
    """A variant beside its audit's verdict, as a heading of rows about it."""
    warning = INVALID if results.failed(variant) else ""
    return Cell(variant, verdict=results.verdict(variant), warning=warning)


def summary_row(summary: pd.DataFrame, variant: str, metric: str) -> pd.Series:
    """Statistics of the final stage's metric."""
    keys = {"variant": variant, "stage": FINAL_STAGE, "metric": metric}
    (row,) = summary[(summary[list(keys)] == pd.Series(keys)).all(axis=1)].index
    return summary.loc[row]


def headline_table(
    results: Results, tables: RunTables, settings: ReportSettings, against: str
) -> Table:
    """A row for each variant: its score, what it is held against, and what it costs."""
    groups = []
    ranked = references(results, against)
    for reference, variants in ranked.items():
        rows = [_headline(results, tables, settings, reference, variant) for variant in variants]
        heading = Cell(f"On {results.datasets[reference]}") if len(ranked) > 1 else None
        groups.append(Group(rows, heading))
    heads = ["Variant", "Audit", "#val_bpb"]
    if len(results.variants) > 1:
        heads.append("#Difference")
    heads += ["#Without adapters", "#Training, s", "#Evaluation, s", "#Artifact, bytes"]
    if settings.baseline:
        heads.append("#Against baseline, nats")
    whose = against if len(ranked) == 1 else f"{against}, or the first variant on the same text"
    order = (
        f" Difference: from {whose}, and its 95 % interval over documents. Variants are sorted by "
        "score, those that failed their audit last."
    )
    return Table(
        "Result",
        "Validation bits per byte of the artifact with adaptation, lower is better: mean ± "
        "standard deviation over seeds, and under it the mean’s 95 % Student-t interval and each "
        "seed’s score. Without adapters: the plain sliding window of the same artifact. Seconds "
        "that count towards the budgets, mean over seeds; the largest artifact, with its code."
        + (order if len(results.variants) > 1 else ""),
        heads,
        groups,
    )


def _headline(
    results: Results, tables: RunTables, settings: ReportSettings, reference: str, variant: str
) -> Row:
    score = summary_row(tables.summary, variant, "val_bpb")
    failed = results.failed(variant)
    seeds = [stage_bpb(results, variant, seed, FINAL_STAGE) for seed in results.seeds]
    told = [interval(score["ci_low"], score["ci_high"])] if len(seeds) > 1 else []
    if 1 < len(seeds) <= MOST_SEEDS_BESIDE:
        told.append(" ".join(map(bits, seeds)))
    row = [
        variant,
        Cell(verdict=results.verdict(variant), detail=", ".join(results.tracks(variant))),
        Cell(
            mean_and_std(score["mean"], score["std"]),
            struck=failed,
            warning=INVALID if failed else "",
            detail="; ".join(told),
        ),
    ]
    if len(results.variants) > 1:
        row.append(_against(results, tables.comparisons, variant, reference))
    plain = [stage_bpb(results, variant, seed, SLIDING) for seed in results.seeds]
    tainted = results.is_tainted(variant, SLIDING)
    row.append(Cell(bits(np.mean(plain)), struck=tainted, warning=TAINTED if tainted else ""))
    own = tables.budgets[tables.budgets["variant"] == variant].groupby("budget")["used"]
    used = own.mean()
    row += [f"{used[f'{kind}_seconds']:,.1f}" for kind in ("training", "evaluation")]
    row.append(count(own.max()["artifact_bytes"]))
    if settings.baseline:
        loss = summary_row(tables.summary, variant, "val_loss")
        beats = " ✓" if loss["welch_p"] < settings.significance else ""
        p = f"p {probability(loss['welch_p'])}{beats}"
        row.append(NONE if failed else Cell(signed(loss["difference_nats"]), detail=p))
    return row


def _against(results: Results, comparisons: pd.DataFrame, variant: str, reference: str) -> Cell:
    if variant == reference:
        return Cell(NONE)
    rows = comparisons[
        (comparisons["variant"] == variant) & (comparisons["reference_variant"] == reference)
    ]
    (row,) = rows.to_dict("records")
    invalid = results.failed(variant) or results.failed(reference)
    spread = interval(row["ci_low"], row["ci_high"], signed)
    return Cell(signed(row["estimate"]), struck=invalid, detail="" if invalid else spread)


def stages_table(results: Results) -> Table:
    """val_bpb of every stage and seed, in groups: first what variants share, then each one's own.

    A final score, and its windows before adaptation, are always in their variant's own group.
    """
    order, own = results.score_stages, (SLIDING, FINAL_STAGE)
    groups = []
    for sharers, stages in results.stages_by_sharers().items():
        shown = [stage for stage in order if stage in stages and stage not in own]
        if len(sharers) > 1 and shown:
            name = results.name_of(sharers, shown[0])
            rows = [_stage_row(results, sharers[0], stage) for stage in shown]
            groups.append(Group(rows, Cell(f"Shared by {name}, not audited by itself")))
    for variant in results.variants:
        shown = [s for s in order if s in own or len(results.sharers(variant, s)) == 1]
        rows = [_stage_row(results, variant, stage) for stage in shown]
        groups.append(Group(rows, Cell(variant, verdict=results.verdict(variant))))
    return Table(
        "Stages",
        "val_bpb of every stage and seed; each number leads to its stage’s metrics.json. Change: "
        "this stage’s mean minus that of the stage before.",
        ["Stage", *seed_heads(results), "#Mean ± std", "#Change"],
        groups,
    )


def _stage_row(results: Results, variant: str, stage: str) -> Row:
    order = results.score_stages
    values = [stage_bpb(results, variant, seed, stage) for seed in results.seeds]
    found, change = describe(values), ""
    if stage != order[0]:
        before = order[order.index(stage) - 1]
        earlier = [stage_bpb(results, variant, seed, before) for seed in results.seeds]
        change = signed(found.mean - describe(earlier).mean)
    tainted = results.is_tainted(variant, stage)
    is_final = stage == FINAL_STAGE
    struck = tainted or (is_final and results.failed(variant))
    name = Cell(
        stage_title(results, variant, stage),
        verdict=results.verdict(variant) if is_final else "",
        warning=TAINTED if tainted else INVALID if struck else "",
    )
    links = [file_link(results, variant, seed, stage, "metrics.json") for seed in results.seeds]
    cells = [
        Cell(bits(value), struck=struck, link=link)
        for value, link in zip(values, links, strict=True)
    ]
    return [name, *cells, Cell(mean_and_std(found.mean, found.std), struck=struck), change]


def stage_title(results: Results, variant: str, stage: str) -> str:
    if stage == SLIDING:
        return "Sliding window, unadapted"
    if stage != FINAL_STAGE:
        return STAGES[stage].title
    titles = joined(results.adapters(variant).values())
    return f"Adapted by {titles}" if titles else "Without adapters"


def differences_by_stage_table(results: Results, against: str) -> Table:
    """Each variant's score at each stage, minus that of the variant it is held against."""
    groups = []
    for reference, variants in references(results, against).items():
        rows = [
            [variant, *(_difference(results, variant, reference, s) for s in results.score_stages)]
            for variant in variants
            if variant != reference
        ]
        if rows:
            heading = named(results, reference)
            groups.append(Group(rows, heading._replace(text=f"against {reference}")))
    return Table(
        "Difference at each stage",
        "val_bpb after the stage, minus that of the variant under which it stands, mean over "
        "seeds ± its standard error, paired by seed; negative is better. Equal: the two share one "
        "run of the stage.",
        ["Variant", *(f"#{stage}" for stage in results.score_stages)],
        groups,
    )


def _difference(results: Results, variant: str, reference: str, stage: str) -> Cell:
    if results.folder(variant, stage) == results.folder(reference, stage):
        return Cell("equal")
    ours, theirs = (
        [stage_bpb(results, one, seed, stage) for seed in results.seeds]
        for one in (variant, reference)
    )
    found = paired_test(ours, theirs)
    error = "" if math.isnan(found.t) else f" ± {bits(abs(found.difference / found.t))}"
    struck = any(
        results.is_tainted(one, stage) or (stage == FINAL_STAGE and results.failed(one))
        for one in (variant, reference)
    )
    return Cell(signed(found.difference) + error, struck=struck)


DOCUMENT_HEADS = ("#Bits per byte", "#Std. error", "95 % interval", "#p", "#Documents")
"""Of what `over_documents` shows."""
SEED_HEADS = ("#Nats per token", "#Welch’s t", "#df", "#p", "#Paired t", "#df", "#p")
"""Of what `over_seeds` shows."""


def over_documents(row: dict[str, Any], p: str, sides: int) -> dict[str, str]:
    """What is shown of a test over documents; p: which of its two, of one or two sides."""
    return {
        "estimate": signed(row["estimate"]),
        "standard_error": bits(row["standard_error"]),
        "interval": interval(row["ci_low"], row["ci_high"], signed),
        "p": probability(row[p], sides * least_p(row["documents"])),
        "documents": count(row["documents"]),
    }


def over_seeds(row: dict[str, Any]) -> list[str]:
    """The difference in nats per token and both tests over seeds."""
    shown = [signed(row["difference_nats"])]
    for kind in ("welch", "paired"):
        t, degrees, p = (row[f"{kind}_{name}"] for name in TEST_FIELDS)
        shown += [decimals(t, 2), decimals(degrees, 1), probability(p)]
    return shown


def between_variants_tables(results: Results, comparisons: pd.DataFrame) -> list[Table]:
    """The differences between final scores, over the text and over the seeds."""
    text: dict[str, list[Row]] = {}
    seeds: dict[str, list[Row]] = {}
    between = comparisons["variant"] != comparisons["reference_variant"]
    for row in comparisons[between].to_dict("records"):
        variant, reference = row["variant"], row["reference_variant"]
        invalid = results.failed(variant) or results.failed(reference)
        name = Cell(variant, warning="failed audit" if invalid else "")
        text.setdefault(reference, []).append([name, *over_documents(row, "p", sides=2).values()])
        seeds.setdefault(reference, []).append([name, *over_seeds(row)])

    def groups(rows: dict[str, list[Row]]) -> list[Group]:
        return [
            Group(own, named(results, reference)._replace(text=f"against {reference}"))
            for reference, own in rows.items()
        ]

    return [
        Table(
            "Difference over the text",
            "The difference of the variants’ scores in bits per byte, of the seeds’ mean losses, "
            "negative is better: paired t-test over documents, p is two-sided; ≤ marks the least "
            "that the test gives for so many documents. The interval is about the choice of text, "
            "not of the seed.",
            ["Variant", *DOCUMENT_HEADS],
            groups(text),
        ),
        Table(
            "Difference over the seeds",
            "The difference of mean losses in nats per token, and two-sided tests of the seeds’ "
            "scores. Welch’s test takes the variants’ seeds for independent runs; the paired "
            "t-test compares seed by seed, so what a seed does to both variants, such as training "
            "that they share, cancels.",
            ["Variant", *SEED_HEADS],
            groups(seeds),
        ),
    ]


def adaptation_table(results: Results, comparisons: pd.DataFrame) -> Table:
    """The change against the plain sliding window of the same artifact: of few variants by seed."""
    groups = []
    for variant in results.variants:
        own = (comparisons["variant"] == variant) & (comparisons["reference_stage"] == SLIDING)
        rows = []
        for row in comparisons[own].to_dict("records"):
            label = "all seeds" if pd.isna(row["seed"]) else f"seed {row['seed']}"
            rows.append([label, *over_documents(row, "p_not_below", sides=1).values()])
        if len(results.seeds) == 1:
            rows = rows[:1]
        elif not results.has_few_variants:
            rows = rows[-1:]
        groups.append(Group(rows, named(results, variant)))
    mean = " All seeds: of their mean losses." if len(results.seeds) > 1 else ""
    return Table(
        "What adaptation changes",
        "Change against the plain sliding window of the same artifact, in bits per byte, negative "
        "is better: paired t-test over documents. p is one-sided, that the change is not below "
        f"zero; ≤ marks the least that the test gives for so many documents.{mean} The interval "
        "is about the choice of text, not of the seed.",
        ["Seed", "#Change", "#Std. error", "95 % interval", "#p", "#Documents"],
        groups,
    )


def adapters_table(results: Results) -> Table:
    """The score with and without each adapter."""
    groups = []
    for variant in results.variants:
        titles = results.adapters(variant)
        sums = [results.tokens[variant, seed] for seed in results.seeds]
        scores = [scores_by_adapter(one) for one in sums]
        rows: list[Row] = []
        for index, name in enumerate((None, *titles)):
            last = index == len(titles)
            struck = results.failed(variant) if last else results.is_tainted(variant, SLIDING)
            title = f"+ {titles[name]}" if name else "Sliding window, no adapter"
            values = [bpb[index] for bpb in scores]
            found = describe(values)
            gains = ["", ""]
            if name:
                gains = [
                    _gain([gain(one, name) for one in sums]) for gain in (gain_bpb, gain_per_token)
                ]
            rows.append(
                [
                    Cell(title, verdict=results.verdict(variant) if last else ""),
                    *(Cell(bits(value), struck=struck) for value in values),
                    Cell(mean_and_std(found.mean, found.std), struck=struck),
                    *gains,
                ]
            )
        if len(titles) > 1:
            gains = [_gain([gain(one) for one in sums]) for gain in (gain_bpb, gain_per_token)]
            rows.append(["In all", *[""] * (len(results.seeds) + 1), *gains])
        groups.append(Group(rows, named(results, variant)))
    return Table(
        "With and without each adapter",
        "val_bpb with the adapters down to the row, and what each takes off the loss that the one "
        "before it leaves, positive is better; mean ± standard deviation over seeds.",
        [
            "Adapter", *seed_heads(results), "#Mean ± std", "#Gain, bits per byte",
            "#Gain, nats per token",
        ],
        groups,
    )  # fmt: skip


def _gain(values: Sequence[float]) -> str:
    found = describe(values)
    return signed(found.mean) + ("" if math.isnan(found.std) else f" ± {bits(found.std)}")
