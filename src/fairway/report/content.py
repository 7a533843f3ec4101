"""Every word and number of report.html, put together from the results as plain text.

How it looks is page.html.j2. A final score is only ever handed to the template inside a row that
carries its audit's verdict, and a failing variant's row says that its number is no valid score.
A change is negative where it is better, a gain positive.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, UNDECIDED
from fairway.audit.lineage import Overlap
from fairway.audit.result import GRAVITY
from fairway.data.manifest import ENOUGH_DOCUMENTS
from fairway.files import sha256_of_json
from fairway.report.format import (
    badge,
    bits,
    check_title,
    count,
    decimals,
    interval,
    joined,
    mean_and_std,
    plural,
    probability,
    quantity,
    signed,
)
from fairway.report.results import FINAL_STAGE, SLIDING, Results
from fairway.report.statistics import describe, least_p
from fairway.report.tables import (
    MOST_FOR_ALL_PAIRS,
    TEST_FIELDS,
    ReportSettings,
    RunTables,
    gain_bpb,
    stage_bpb,
    variants_by_text,
)
from fairway.report.token_sums import TokenSums, gain_nats, saved_nats
from fairway.stages import STAGES, chain

TRACKS = {
    "adaptive": "adaptive (the evaluator changes its predictions as it reads)",
    "fixed": "fixed (the model's own predictions)",
}
BUDGET_TITLES = {
    "artifact_bytes": "Artifact, code and weights",
    "training_seconds": "Reading training data",
    "evaluation_seconds": "Evaluation",
}
FEW_WINDOWS = 5
"""An adapter learns in one window for the next; in fewer there is no next to speak of."""


class Caption(NamedTuple):
    """A figure's heading, the statistic that it shows and what that means, its text alternative."""

    title: str
    text: str
    alternative: str


def page_content(results: Results, tables: RunTables, settings: ReportSettings) -> dict[str, Any]:
    """Every text that the template prints, section by section."""
    return {
        "run": results.run,
        "seeds": results.seeds,
        "seed_names": [f"Seed {seed}" for seed in results.seeds],
        "seed_columns": [f"#Seed {seed}" for seed in results.seeds],
        "lede": [_lede(results, tables.summary, variant) for variant in results.variants],
        "facts": _facts(results),
        "baseline": settings.baseline,
        "settings": settings,
        "cautions": cautions(results),
        "byte_notes": byte_notes(results),
        "headline": [_headline(results, tables, settings, name) for name in results.variants],
        "stages": _stage_groups(results),
        "changes": _changes_by_seed(results, tables.comparisons),
        "gains": _gains_by_adapter(results),
        "comparisons": _comparisons(results, tables.comparisons),
        "comparison_notes": _comparison_notes(results),
        "audits": [_audit(results, variant) for variant in results.variants],
        "attribution": [_attribution(results, variant) for variant in results.variants],
        "budgets": _budgets(tables.budgets),
        "provenance": _provenance(results),
        "identity": identity(results),
        "captions": _captions(results),
    }


def _lede(results: Results, summary: pd.DataFrame, variant: str) -> dict[str, str]:
    score = _summary_row(summary, variant, "val_bpb")
    number = mean_and_std(score["mean"], score["std"])
    text = f"scored {number} bits per byte over {plural(len(results.seeds), 'seed')}"
    verdict = results.verdict(variant)
    if verdict == FAIL:
        failing = joined([check_title(name).lower() for name in results.checks_with(variant, FAIL)])
        text, meaning = "", f"failed its audit ({failing}): its number is not a valid score."
    elif verdict != PASS:
        meaning = "but its audit is incomplete, so the score is not yet shown to be valid."
    else:
        meaning = "and passed every check of its audit."
    return {"variant": variant, "verdict": verdict, "score": text, "meaning": meaning}


def _summary_row(summary: pd.DataFrame, variant: str, metric: str) -> pd.Series:
    keys = {"variant": variant, "stage": FINAL_STAGE, "metric": metric}
    (row,) = summary[(summary[list(keys)] == pd.Series(keys)).all(axis=1)].index
    return summary.loc[row]


def _facts(results: Results) -> list[tuple[str, str]]:
    scored, overlaps = {}, {}
    for variant, dataset in results.datasets.items():
        sums, overlap = (
            results.tokens[variant, results.seeds[0]],
            results.manifests[variant].overlap,
        )
        total = sums.total()
        scored[dataset] = (
            f"{plural(len(sums.by_document), 'document')}, {count(total['tokens'])} tokens, "
            f"{count(total['bytes'])} bytes"
        )
        found = overlap and Overlap(**overlap.model_dump())
        overlaps[dataset] = str(found or "not checked")
    devices = sorted({metrics["device"] for metrics in results.metrics.values()})
    return [
        ("Data", ", ".join(scored)),
        ("Scored on", "; ".join(_by_name(scored))),
        ("Overlap", "; ".join(_by_name(overlaps))),
        ("Seeds", ", ".join(map(str, results.seeds))),
        ("Machine", "; ".join(devices)),
    ]


def _by_name(texts: Mapping[str, str]) -> list[str]:
    """What is said of each dataset, by its name where there are several."""
    return [text if len(texts) == 1 else f"{name}: {text}" for name, text in texts.items()]


def byte_notes(results: Results) -> list[str]:
    """How val_bpb would change by the bytes of the text before the tokenizer normalized it."""
    notes = {}
    for variant, dataset in results.datasets.items():
        original = results.manifests[variant].original
        counted = results.tokens[variant, results.seeds[0]].total()["bytes"]
        if original is None:
            text = "How many bytes the text had before normalization is not known."
        elif not original.validation.changed_documents:
            bytes_ = count(original.validation.bytes)
            text = f"Tokens decode to the text exactly as it was, all {bytes_} bytes of it."
        else:
            change = counted / original.validation.bytes - 1
            text = (
                f"The text had {count(original.validation.bytes)} bytes before normalization; "
                f"its tokens decode to {count(counted)}. Per original byte val_bpb is "
                f"{abs(change):.2%} {'lower' if change < 0 else 'higher'}."
            )
        notes[dataset] = text
    return _by_name(notes)


def cautions(results: Results) -> list[str]:
    """What is to be known of the scored text, a sentence each."""
    found = []
    several = len(set(results.datasets.values())) > 1
    for variant in results.variants:
        told = list(results.manifests[variant].warnings)
        documents = len(results.tokens[variant, results.seeds[0]].by_document)
        if documents < ENOUGH_DOCUMENTS and not told:  # made before datasets said so themselves
            told = [f"The scored text has {documents} documents, few for an interval over them."]
        found += [f"{results.datasets[variant]}: {text}" if several else text for text in told]
        windows = results.metrics[variant, results.seeds[0], FINAL_STAGE]["windows"]
        if windows < FEW_WINDOWS:
            found.append(
                f"{variant} was scored in {plural(windows, 'window')}: what adaptation gains in "
                f"fewer than {FEW_WINDOWS} says little."
            )
    return list(dict.fromkeys(found))


def _headline(
    results: Results, tables: RunTables, settings: ReportSettings, variant: str
) -> dict[str, Any]:
    """One variant's score with its verdict and, where it failed, the reasons."""
    score = _summary_row(tables.summary, variant, "val_bpb")
    loss = _summary_row(tables.summary, variant, "val_loss")
    change = _changes(tables.comparisons, variant).iloc[-1]
    failed = results.failed(variant)
    beats = " ✓" if loss["welch_p"] < settings.significance else ""
    failing = results.checks_with(variant, FAIL)
    return {
        "variant": variant,
        "badge": badge(results.verdict(variant)),
        "tracks": results.tracks(variant),
        "valid": not failed,
        "score": mean_and_std(score["mean"], score["std"]),
        "interval": interval(score["ci_low"], score["ci_high"]),
        "n": int(score["n"]),
        "change": signed(change["estimate"]),
        "difference": "–" if failed else signed(loss["difference_nats"]),
        "p": "–" if failed else probability(loss["welch_p"]) + beats,
        "reasons": [_outcome(results, variant, name) for name in failing],
        "open": [
            (verdict.lower(), [check_title(name) for name in names])
            for verdict in (UNDECIDED, NOT_RUN)
            if (names := results.checks_with(variant, verdict))
        ],
    }


def _stage_groups(results: Results) -> list[dict[str, Any]]:
    """The stages' val_bpb in groups: first what variants share, then what each has for itself.

    A final score, and its windows before adaptation, are always in their variant's own group.
    """
    order, own = results.score_stages, (SLIDING, FINAL_STAGE)
    groups = []
    for sharers, stages in results.stages_by_sharers().items():
        shown = [stage for stage in order if stage in stages and stage not in own]
        if len(sharers) > 1 and shown:
            name = results.name_of(sharers, shown[0])
            title = f"Shared by {name}, not audited by itself"
            rows = [_stage_row(results, sharers[0], stage) for stage in shown]
            groups.append({"title": title, "badge": None, "rows": rows})
    for variant in results.variants:
        shown = [s for s in order if s in own or len(results.sharers(variant, s)) == 1]
        rows = [_stage_row(results, variant, stage) for stage in shown]
        mark = badge(results.verdict(variant))
        groups.append({"title": variant, "badge": mark, "rows": rows})
    return groups


def _stage_row(results: Results, variant: str, stage: str) -> dict[str, Any]:
    order = results.score_stages
    values = [stage_bpb(results, variant, seed, stage) for seed in results.seeds]
    found = describe(values)
    change = ""
    if stage != order[0]:
        before = order[order.index(stage) - 1]
        earlier = [stage_bpb(results, variant, seed, before) for seed in results.seeds]
        change = signed(found.mean - describe(earlier).mean)
    tainted = results.is_tainted(variant, stage)
    is_final = stage == FINAL_STAGE
    return {
        "name": stage_title(results, variant, stage),
        "values": [bits(value) for value in values],
        "score": mean_and_std(found.mean, found.std),
        "change": change,
        "tainted": tainted,
        "valid": not (tainted or (is_final and results.failed(variant))),
        "badge": badge(results.verdict(variant)) if is_final else None,
    }


def stage_title(results: Results, variant: str, stage: str) -> str:
    if stage == SLIDING:
        return "Sliding window, unadapted"
    if stage != FINAL_STAGE:
        return STAGES[stage].title
    titles = joined(results.adapters(variant).values())
    return f"Adapted by {titles}" if titles else "Without adapters"


def _heading(results: Results, variant: str) -> dict[str, Any]:
    mark = badge(results.verdict(variant))
    return {"variant": variant, "badge": mark, "valid": not results.failed(variant)}


def _changes(comparisons: pd.DataFrame, variant: str) -> pd.DataFrame:
    """A variant's rows against its own plain sliding window: one of each seed, last that of all."""
    rows = (comparisons["variant"] == variant) & (comparisons["reference_stage"] == SLIDING)
    return comparisons[rows]


def over_documents(row: dict[str, Any], p: str, sides: int) -> dict[str, str]:
    """What is shown of a test over documents; p: which of its two, of one or two sides."""
    return {
        "estimate": signed(row["estimate"]),
        "standard_error": bits(row["standard_error"]),
        "interval": interval(row["ci_low"], row["ci_high"], signed),
        "p": probability(row[p], sides * least_p(row["documents"])),
        "documents": count(row["documents"]),
    }


def _changes_by_seed(results: Results, comparisons: pd.DataFrame) -> list[dict[str, Any]]:
    """The change against the plain sliding window of the same artifact: of few variants by seed."""
    groups = []
    for variant in results.variants:
        rows = []
        for row in _changes(comparisons, variant).to_dict("records"):
            label = "all seeds" if pd.isna(row["seed"]) else f"seed {row['seed']}"
            rows.append({"label": label} | over_documents(row, "p_not_below", sides=1))
        if len(results.seeds) == 1:
            shown = rows[:1]
        else:
            shown = rows if results.has_few_variants else rows[-1:]
        groups.append(_heading(results, variant) | {"rows": shown})
    return groups


def _comparisons(results: Results, comparisons: pd.DataFrame) -> list[dict[str, Any]]:
    """The differences between variants' final scores, in groups of one reference."""
    groups: dict[str, list[dict[str, Any]]] = {}
    between = comparisons["variant"] != comparisons["reference_variant"]
    for row in comparisons[between].to_dict("records"):
        variant, reference = row["variant"], row["reference_variant"]
        valid = not (results.failed(variant) or results.failed(reference))
        shown = {"label": variant, "valid": valid, "nats": signed(row["difference_nats"])}
        shown["tests"] = []
        for kind in ("welch", "paired"):
            t, degrees, p = (row[f"{kind}_{name}"] for name in TEST_FIELDS)
            shown["tests"] += [decimals(t, 2), decimals(degrees, 1), probability(p)]
        groups.setdefault(reference, []).append(shown | over_documents(row, "p", sides=2))
    return [_heading(results, reference) | {"rows": rows} for reference, rows in groups.items()]


def _comparison_notes(results: Results) -> list[str]:
    """What is not compared, and why."""
    groups, notes = variants_by_text(results), []
    if len(groups) > 1:
        texts = "; ".join(joined(group) for group in groups)
        notes.append(f"Only variants that scored the same documents are compared: {texts}.")
    if max(map(len, groups)) > MOST_FOR_ALL_PAIRS:
        notes.append(
            f"Of more than {MOST_FOR_ALL_PAIRS} variants, each is compared with the first."
        )
    return notes


def _gains_by_adapter(results: Results) -> list[dict[str, Any]]:
    """What each adapter and all together gain over the text: by seed, and mean ± std."""
    groups = []
    for variant in results.variants:
        rows, titles = [], dict(results.adapters(variant))
        for adapter, title in (
            titles.items() if len(titles) == 1 else (*titles.items(), (None, "in all"))
        ):
            sums = [results.tokens[variant, seed] for seed in results.seeds]
            bpb = [gain_bpb(one, adapter) for one in sums]
            nats = [_gain_per_token(one, adapter) for one in sums]
            rows += [_gain_row(title, "bits per byte", bpb), _gain_row("", "nats per token", nats)]
        groups.append(_heading(results, variant) | {"rows": rows})
    return groups


def _gain_row(name: str, unit: str, gains: list[float]) -> dict[str, Any]:
    found = describe(gains)
    spread = "" if math.isnan(found.std) else f" ± {bits(found.std)}"
    values = [signed(value) for value in gains]
    return {"name": name, "unit": unit, "values": values, "mean": signed(found.mean) + spread}


def _gain_per_token(sums: TokenSums, adapter: str | None) -> float:
    total = sums.total()
    return saved_nats(total, adapter) / total["tokens"]


def _attribution(results: Results, variant: str) -> dict[str, Any]:
    """Mean over seeds of the gain, split by whether targets were in the loss of their own delta."""
    groups = [
        results.tokens[variant, seed].by_own_loss.reindex([False, True]) for seed in results.seeds
    ]
    mean = sum(groups[1:], groups[0]).fillna(0) / len(groups)
    saved, gains = saved_nats(mean), gain_nats(mean)
    tokens = mean["tokens"].sum()
    rows = [
        {
            "label": "in the loss of their own delta" if own else "not in that loss",
            "share": f"{mean['tokens'][own] / tokens:.1%}",
            "gain": signed(gains[own]),
            "part": signed(saved[own] / tokens),
        }
        for own in (True, False)
    ]
    return _heading(results, variant) | {"total": signed(saved.sum() / tokens), "rows": rows}


def _outcome(results: Results, variant: str, name: str) -> dict[str, Any]:
    """One check of a variant: a badge for each seed, and the gravest verdict's sentence."""
    by_seed = results.checks(variant)[name]
    ranked = (*GRAVITY, NOT_APPLICABLE)
    seed = min(by_seed, key=lambda one: ranked.index(by_seed[one].verdict))
    same = [str(one) for one in by_seed if by_seed[one].verdict == by_seed[seed].verdict]
    some = f"seed{'s' if len(same) > 1 else ''} {joined(same)}"
    return {
        "title": check_title(name),
        "badges": [
            badge(by_seed[one].verdict) if one in by_seed else None for one in results.seeds
        ],
        "sentence": by_seed[seed].sentence,
        "where": "every seed" if len(same) == len(results.seeds) else some,
        "quoted_seed": seed,
    }


def _audit(results: Results, variant: str) -> dict[str, Any]:
    audits = [results.audits[variant, seed] for seed in results.seeds]
    return _heading(results, variant) | {
        "open": results.has_few_variants or results.failed(variant),
        "rows": [_outcome(results, variant, name) for name in results.checks(variant)],
        "track": joined(TRACKS.get(track, track) for track in results.tracks(variant)),
        "meanings": sorted({audit.meaning_of_pass for audit in audits}),
    }


def _budgets(budgets: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for (variant, name), group in budgets.groupby(["variant", "budget"], sort=False):
        limit, most, unit = group["limit"].iloc[0], group["used"].max(), group["unit"].iloc[0]
        rows.append(
            {
                "variant": variant,
                "name": BUDGET_TITLES[name],
                "values": [quantity(used, unit) for used in group["used"]],
                "limit": quantity(limit, unit),
                "share": f"{most / limit:.1%}",
                "within": bool(most <= limit),
            }
        )
    return rows


def _provenance(results: Results) -> list[dict[str, Any]]:
    """What each stage was made from, for the first seed; the others differ in the seed only."""
    rows = []
    for sharers, stages in results.stages_by_sharers().items():
        for stage in stages:
            entry = results.provenance[sharers[0], results.seeds[0], stage]
            rows.append(
                {
                    "stage": stage,
                    "folder": results.folder(sharers[0], stage),
                    "used_by": results.name_of(sharers, stage),
                    "splits": ", ".join(entry.splits) or "none",
                    "tainted": "val" in entry.splits and stage != "audit",
                    "settings": sha256_of_json(entry.settings)[:12],
                    "commit": _short_commit(entry.git_commit),
                }
            )
    return rows


def _short_commit(commit: str | None) -> str:
    if not commit:
        return "not in a git checkout"
    digits, _, dirty = commit.partition("-")
    return digits[:12] + (" with local changes" if dirty else "")


def identity(results: Results) -> dict[str, Any]:
    """Commits, versions and the hash over every stage's settings, independent of key order."""
    commits = sorted({entry.git_commit or "" for entry in results.provenance.values()})
    settings = {
        f"{results.folder(variant, stage)} {stage}": entry.settings
        for (variant, _, stage), entry in results.provenance.items()
    }
    versions: dict[str, set[str]] = {}
    for entry in results.provenance.values():
        for package, version in entry.versions.items():
            versions.setdefault(package, set()).add(version)
    return {
        "commits": [_short_commit(commit) for commit in commits],
        "checkout": commits[0].partition("-")[0] if len(commits) == 1 else "",
        "settings_hash": sha256_of_json(settings),
        "versions": {name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
    }


def _captions(results: Results) -> dict[str, Caption]:
    """Captions by figure name."""
    seeds = plural(len(results.seeds), "seed")
    failed = [variant for variant in results.variants if results.failed(variant)]
    warning = (
        f" Dashed and hollow: {joined(failed)}, which failed the audit; that score is not valid."
        if failed
        else ""
    )
    audits = _seconds(results, ["audit"])
    others = _seconds(results, [stage.name for stage in chain("report") if stage.name != "audit"])
    one_training = len({results.folder(variant, "train") for variant in results.variants}) == 1
    if results.has_few_variants:
        panels = (
            "Each variant has its own scale. Left, by the tokens since the document began, in "
            "doubling bins with the number of targets in each, in all and by adapter; right, in "
            "all along the text."
        )
    else:
        panels = (
            "Variants that failed the audit have a scale of their own. Left, by the tokens since "
            "the document began, in doubling bins with the number of targets in each; right, along "
            "the text. gains.parquet splits them by adapter."
        )
    return {
        "bpb_by_stage": Caption(
            "Validation bits per byte by stage",
            f"Each point is one of {seeds}, each line the mean; black where variants share a "
            "stage. A step down is what the stage gained; the step up at gptq is the price of "
            f"fitting the artifact.{warning}",
            "Line chart of val_bpb after each stage, one line per variant.",
        ),
        "training_curves": Caption(
            "Training curves",
            "Training loss in nats per token against tokens seen, over the learning-rate scale. "
            + (
                "One line per seed; the distance between them is what chance does to a run."
                if one_training
                else "One color per training run's settings, one line per seed."
            ),
            "Line chart of training loss over tokens seen, one line per training run and seed.",
        ),
        "gain_by_position": Caption(
            "Where adaptation gains",
            f"Mean loss before minus after adaptation, in nats per token; points are {seeds}. "
            f"{panels} An honest gain needs text to learn from, so it should be small where a "
            "document begins, and level along the text.",
            "Line charts of the gain by position in the document and by position in the text.",
        ),
        "leak": Caption(
            "Where a leak sits",
            "Left, the mean gain of targets that were in the loss of the delta that scored them, "
            "and of the rest: a causal method has none of the former. Right, the share of "
            "distributions that changed when a token so many positions after them was replaced. A "
            "causal method shows none at any distance; a delta shared by a batch of windows shows "
            "the length of that batch (dotted; the first window of the text scores more).",
            "Bar chart of the gain by membership in the delta's loss, and histogram of how far "
            "back a replaced token changed distributions.",
        ),
        "budgets": Caption(
            "Budgets",
            "The most that any seed used of each limit; the upright line is the limit. The "
            "artifact counts with the code that scores it.",
            "Bar charts of artifact bytes, training seconds and evaluation seconds per variant.",
        ),
        "stage_times": Caption(
            "Stage times",
            f"Wall-clock seconds of each stage: the bar is the mean over {seeds}, each point one "
            f"seed. A stage that variants share ran once. The audits took {audits / others:.0%} of "
            "what the other stages took together.",
            "Bar chart of wall-clock seconds per stage and variant.",
        ),
    }


def _seconds(results: Results, stages: Sequence[str]) -> float:
    """What these stages took in all, each of their runs counted once."""
    return sum(
        results.metrics[sharers[0], seed, stage]["seconds"]
        for sharers, shared in results.stages_by_sharers().items()
        for stage in shared
        for seed in results.seeds
        if stage in stages
    )
