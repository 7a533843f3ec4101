"""Two results against each other, A and B, as tables of text for a terminal or a page.

Every difference is B minus A, so negative is better. A score stands beside its audit's verdict.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fairway.errors import UserError
from fairway.provenance import Provenance
from fairway.report.configuration import changed_keys, dataset_record, resolved, value_text
from fairway.report.content import BUDGET_TITLES
from fairway.report.format import (
    NONE,
    bits,
    count,
    interval,
    joined,
    mean_and_std,
    plural,
    quantity,
    signed,
)
from fairway.report.origin import identity
from fairway.report.results import FINAL_STAGE, SLIDING, Results, stage_of
from fairway.report.scores import (
    DOCUMENT_HEADS,
    INVALID,
    SEED_HEADS,
    TAINTED,
    over_documents,
    over_seeds,
    stage_title,
)
from fairway.report.statistics import describe
from fairway.report.table import Cell, Group, Row, Table
from fairway.report.tables import budgets_table, compared, stage_bpb, variants_by_text
from fairway.stages import STAGES

A, B = SIDES = ("A", "B")
BY_VARIANT = ("folders", "manifests")
BY_VARIANT_AND_SEED = ("metrics", "provenance", "curves", "layers", "tokens", "audits", "reach")
"""The fields of Results whose keys are a variant, or begin with a variant and a seed."""


def side_by_side(sides: Mapping[str, tuple[Results, str]]) -> Results:
    """One variant of each of several results, over the same seeds, under new names.

    sides: by the new name, the results and their variant. Folders are told apart by their run's.
    """
    found: dict[str, dict] = {field: {} for field in (*BY_VARIANT, *BY_VARIANT_AND_SEED)}
    for name, (results, variant) in sides.items():
        for field in BY_VARIANT:
            found[field][name] = getattr(results, field)[variant]
        for field in BY_VARIANT_AND_SEED:
            values = getattr(results, field).items()
            found[field] |= {(name, *key[1:]): one for key, one in values if key[0] == variant}
    every = [results for results, _ in sides.values()]
    files = {path: digest for results in every for path, digest in results.files.items()}
    return Results(
        run=joined(sides), path=every[0].path, seeds=every[0].seeds, files=files, **found
    )


def comparison(results: Results) -> list[Table]:
    """The tables of two results; UserError where A and B did not score the same documents."""
    if len(variants_by_text(results)) > 1:
        raise UserError(
            f"A and B have not scored the same documents: A has {_text(results, A)}, B has "
            f"{_text(results, B)}; compare results on the same validation text (section data)"
        )
    return [
        _scores(results),
        *_differences(results),
        _stages(results),
        _seconds(results),
        _budgets(results),
        _settings(results),
    ]


def _text(results: Results, side: str) -> str:
    documents = results.tokens[side, results.seeds[0]].by_document["bytes"]
    return f"{plural(len(documents), 'document')} of {count(documents.sum())} bytes"


def _scores(results: Results) -> Table:
    rows = []
    for side in SIDES:
        score = describe([stage_bpb(results, side, seed, FINAL_STAGE) for seed in results.seeds])
        failed = results.failed(side)
        spread = Cell(interval(score.ci_low, score.ci_high), struck=failed)
        mean = Cell(mean_and_std(score.mean, score.std), struck=failed)
        verdict = Cell(verdict=results.verdict(side))
        note = Cell(warning=INVALID if failed else "")
        rows.append([side, verdict, mean, spread, str(score.n), note])
    return Table(
        "Scores",
        "Validation bits per byte with adaptation, lower is better; mean ± standard deviation over "
        "seeds, 95 % Student-t interval of the mean.",
        ["Result", "Audit", "#val_bpb", "95 % interval", "#Seeds", "Note"],
        [Group(rows)],
    )


def _differences(results: Results) -> tuple[Table, Table]:
    """Over the text, by seed and of all seeds; and over the seeds."""
    seeds = results.seeds if len(results.seeds) > 1 else ()
    cases = [(B, FINAL_STAGE, seed, A, FINAL_STAGE) for seed in (*seeds, None)]
    found = compared(results, [*cases, (B, SLIDING, None, A, SLIDING)]).to_dict("records")
    every = "all seeds" if seeds else f"seed {results.seeds[0]}"
    labels = [*(f"seed {seed}" for seed in seeds), every, f"{every}, without adapters"]
    failed = [side for side in SIDES if results.failed(side)]
    note = Cell(warning=f"{joined(failed)} failed the audit") if failed else Cell("valid")
    text = [
        [label, *over_documents(row, "p", sides=2).values(), note]
        for label, row in zip(labels, found, strict=True)
    ]
    tests = over_seeds(found[-2])
    return (
        Table(
            "Difference over the text",
            "B minus A in bits per byte, paired by document; p is two-sided, ≤ marks the least "
            "that the test gives for so many documents. All seeds: of their mean losses. The "
            "interval is about the choice of text, not of the seed.",
            ["Seeds", *DOCUMENT_HEADS, "Note"],
            [Group(text)],
        ),
        Table(
            "Difference over the seeds",
            "B minus A in nats per token (none where their tokens differ), and two-sided tests of "
            "the seeds’ val_bpb: Welch’s takes all runs for independent, the paired t-test "
            "compares seed by seed.",
            ["Seeds", *SEED_HEADS, "Note"],
            [Group([[str(len(results.seeds)), *tests, note]])],
        ),
    )


def _stages(results: Results) -> Table:
    """Where the scores part, and why."""
    dataset = {side: dataset_record(results, side) for side in SIDES}
    rows = [["Tokens and splits", NONE, NONE, NONE, *_sharing(results, "tokenize", dataset), ""]]
    for stage in [*results.score_stages, "audit"]:
        scores = [NONE] * 3
        if stage != "audit":
            a, b = (
                np.mean([stage_bpb(results, side, seed, stage) for seed in results.seeds])
                for side in SIDES
            )
            scores = [bits(a), bits(b), signed(b - a)]
        records = {
            side: results.provenance[side, results.seeds[0], stage_of(stage)] for side in SIDES
        }
        title = stage_title(results, B, stage) if stage == SLIDING else STAGES[stage].title
        tainted = [side for side in SIDES if stage != "audit" and results.is_tainted(side, stage)]
        note = Cell(warning=f"{joined(tainted)} {TAINTED}" if tainted else "")
        rows.append([title, *scores, *_sharing(results, stage_of(stage), records), note])
    return Table(
        "Stages",
        "val_bpb, mean over seeds. Shared: one run serves both, or both made the same bytes. "
        "Otherwise, what their records say differs.",
        ["Stage", "#A", "#B", "#B − A", "Shared", "Differs in", "Note"],
        [Group(rows)],
    )


def _sharing(results: Results, stage: str, records: Mapping[str, Provenance]) -> list[str]:
    """Whether A and B share a stage, and what of its record differs."""
    own = {
        "settings": [records[side].settings for side in SIDES],
        "commit": [records[side].git_commit for side in SIDES],
        "versions": [records[side].versions for side in SIDES],
    }
    causes = [name for name, (ours, theirs) in own.items() if ours != theirs]
    causes += [one for one in STAGES[stage].needs if not _same_product(results, one)]
    if stage != "tokenize" and results.folder(A, stage) == results.folder(B, stage):
        return ["one run", ""]
    return ["same bytes" if _same_product(results, stage) else "no", ", ".join(causes)]


def _same_product(results: Results, stage: str) -> bool:
    """Whether the first product of a stage is the same for every seed; of a dataset, the shards."""
    if stage == "tokenize":
        ours, theirs = (results.manifests[side] for side in SIDES)
        return (ours.shards, ours.splits) == (theirs.shards, theirs.splits)
    (product, *_) = STAGES[stage].products or ("",)
    made = [
        [results.provenance[side, seed, stage].outputs.get(product) for seed in results.seeds]
        for side in SIDES
    ]
    return made[0] == made[1] and None not in made[0]


def _seconds(results: Results) -> Table:
    """What each stage took."""
    seconds = np.array(
        [
            [
                np.mean([results.metrics[side, seed, stage]["seconds"] for seed in results.seeds])
                for side in SIDES
            ]
            for stage in results.stages
        ]
    )
    memory = [
        [
            max(results.metrics[side, seed, stage]["peak_memory_bytes"] for seed in results.seeds)
            for side in SIDES
        ]
        for stage in results.stages
    ]
    peaks = [*memory, np.max(memory, axis=0)]
    rows = []
    for stage, taken, peak in zip(
        [*results.stages, "all"], [*seconds, seconds.sum(axis=0)], peaks, strict=True
    ):
        title = STAGES[stage].title if stage in STAGES else "All stages"
        change = f"{taken[1] - taken[0]:+,.1f}".replace("-", "−")
        times = [f"{one:,.1f}" for one in taken]
        rows.append([title, *times, change, *(f"{one / 2**30:.2f}" for one in peak)])
    devices = {
        side: joined(
            sorted({one["device"] for key, one in results.metrics.items() if key[0] == side})
        )
        for side in SIDES
    }
    return Table(
        "Seconds and memory",
        f"Wall-clock seconds, mean over seeds; the most memory of any seed. A ran on {devices[A]}, "
        f"B on {devices[B]}.",
        ["Stage", "#A, s", "#B, s", "#B − A, s", "#A, GiB", "#B, GiB"],
        [Group(rows)],
    )


def _budgets(results: Results) -> Table:
    rows = []
    for name, group in budgets_table(results).groupby("budget", sort=False):
        used = group.groupby("variant")["used"].max()
        unit = group["unit"].iloc[0]
        change = quantity(used[B] - used[A], unit).replace("-", "−")
        limits = joined(dict.fromkeys(quantity(limit, unit) for limit in group["limit"]))
        amounts = [quantity(used[side], unit) for side in SIDES]
        rows.append([BUDGET_TITLES[name], *amounts, change, limits])
    return Table(
        "Budgets",
        "The largest use of any seed.",
        ["Budget", "#A", "#B", "#B − A", "#Limit"],
        [Group(rows)],
    )


def _settings(results: Results) -> Table:
    """Every key that differs, and the commits and versions."""
    ours, theirs = (_settings_and_code(results, side) for side in SIDES)
    rows: list[Row] = [
        [key, value_text(a), value_text(b)] for key, a, b in changed_keys(ours, theirs)
    ]
    caption = "" if rows else "A and B have the same settings, commits and versions."
    return Table("What differs", caption, ["Key", "A", "B"], [Group(rows)])


def _settings_and_code(results: Results, side: str) -> dict[str, Any]:
    code = identity(side_by_side({side: (results, side)}))
    told = {"commit": ", ".join(code["commits"]), "version": code["versions"]}
    return resolved(results, side) | told
