"""Every word and number of report.html, put together from the results as plain text.

How it looks is page.html.j2. A final score is only ever handed to the template inside a row that
carries its audit's verdict, and a failing variant's row says that its number is no valid score.
"""

from typing import Any

import pandas as pd

from fairway.files import sha256_of_json
from fairway.report.adaptation import (
    attribution,
    changes_by_seed,
    changes_of,
    comparisons_of_variants,
    gains_by_adapter,
)
from fairway.report.format import (
    adapter_name,
    badge,
    bits,
    check_title,
    count,
    interval,
    joined,
    mean_and_std,
    probability,
    quantity,
    signed,
)
from fairway.report.results import FAIL, NOT_RUN, PASS, SHARED, SHARED_STAGES, Results
from fairway.report.statistics import RESAMPLES, describe
from fairway.report.tables import FINAL_STAGE, STAGES, ReportSettings, Tables, stage_bpb

STAGE_NAMES = {
    "train": "Training, last step",
    "ema": "Weight averaging (EMA)",
    "ttt": "Test-time training (TTT)",
    "gptq": "Quantised artifact (GPTQ)",
    "sliding": "Sliding window, unadapted",
}
TRACKS = {
    "adaptive": "adaptive (the evaluator changes its predictions as it reads)",
    "fixed predictor": "fixed predictor (the plain model's predictions)",
}
BUDGET_NAMES = {
    "artifact_bytes": "Artifact, code and weights",
    "training_seconds": "Reading training data",
    "evaluation_seconds": "Evaluation",
}


def page_content(results: Results, tables: Tables, settings: ReportSettings) -> dict[str, Any]:
    """Every text that the template prints, section by section."""
    return {
        "run": results.run,
        "lede": [_lede(results, tables.summary, variant) for variant in results.variants],
        "facts": _facts(results),
        "baseline": settings.baseline,
        "settings": settings,
        "headline": [headline_row(results, tables, settings, name) for name in results.variants],
        "changes": changes_by_seed(results, tables.comparisons),
        "comparisons": comparisons_of_variants(results, tables.comparisons),
        "gains": gains_by_adapter(results),
        "resamples": count(RESAMPLES),
        "least_p": probability(1 / (RESAMPLES + 1)),
        "stages": _stage_groups(results),
        "seeds": results.seeds,
        "audits": [_audit(results, variant) for variant in results.variants],
        "attribution": [attribution(results, variant) for variant in results.variants],
        "budgets": _budgets(results, tables.budgets),
        "provenance": _provenance(results),
        "identity": _identity(results),
    }


def headline_row(
    results: Results, tables: Tables, settings: ReportSettings, variant: str
) -> dict[str, Any]:
    """One variant's score with its verdict and, where it failed, the reasons."""
    score = _summary_row(tables.summary, variant, "val_bpb")
    loss = _summary_row(tables.summary, variant, "val_loss")
    change = changes_of(tables.comparisons, variant).iloc[-1]
    failed = results.verdict(variant) == FAIL
    failing = results.checks_with(variant, FAIL)
    return {
        "variant": variant,
        "badge": badge(results.verdict(variant)),
        "tracks": _tracks(results, variant),
        "valid": not failed,
        "score": mean_and_std(score["mean"], score["std"]),
        "interval": interval(score["ci_low"], score["ci_high"]),
        "n": int(score["n"]),
        "change": signed(change["estimate"]),
        "difference": "–" if failed else signed(loss["difference_nats"]),
        "p": "–" if failed else probability(loss["welch_p"]),
        "beats": not failed and loss["welch_p"] < settings.significance,
        "reasons": [_outcome(results, variant, name) for name in failing],
        "not_run": [check_title(name) for name in results.checks_with(variant, NOT_RUN)],
    }


def _tracks(results: Results, variant: str) -> list[str]:
    """The audits' tracks, by the names of today."""
    return [{"fixed": "fixed predictor"}.get(one, one) for one in results.tracks(variant)]


def _summary_row(summary: pd.DataFrame, variant: str, metric: str) -> pd.Series:
    rows = summary[
        (summary["variant"] == variant)
        & (summary["stage"] == FINAL_STAGE)
        & (summary["metric"] == metric)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


def _lede(results: Results, summary: pd.DataFrame, variant: str) -> dict[str, str]:
    score = _summary_row(summary, variant, "val_bpb")
    seeds = f"{len(results.seeds)} seed" + ("s" if len(results.seeds) > 1 else "")
    text = f"{mean_and_std(score['mean'], score['std'])} bits per byte over {seeds}"
    verdict = results.verdict(variant)
    if verdict == FAIL:
        names = joined([check_title(name).lower() for name in results.checks_with(variant, FAIL)])
        meaning = f"failed its audit ({names}): its number is not a valid score."
        return {"variant": variant, "verdict": verdict, "score": "", "meaning": meaning}
    not_run = results.checks_with(variant, NOT_RUN)
    if verdict == PASS and not not_run:
        meaning = "and passed every check of its audit."
    elif verdict == PASS:
        names = joined([check_title(name).lower() for name in not_run])
        meaning = f"and passed every check of its audit that ran (not run: {names})."
    else:
        meaning = "but its audit is incomplete, so the score is not yet shown to be valid."
    return {"variant": variant, "verdict": verdict, "score": f"scored {text}", "meaning": meaning}


def _facts(results: Results) -> list[tuple[str, str]]:
    key = (results.variants[0], results.seeds[0])
    total = results.tokens[key].total()
    documents = len(results.tokens[key].by_document)
    devices = sorted({metrics["device"] for metrics in results.metrics.values()})
    return [
        ("Data", results.dataset_name),
        (
            "Scored on",
            f"{count(documents)} documents, {count(total['tokens'])} tokens, "
            f"{count(total['bytes'])} bytes",
        ),
        ("Seeds", ", ".join(str(seed) for seed in results.seeds)),
        ("Machine", "; ".join(devices)),
    ]


def _stage_groups(results: Results) -> list[dict[str, Any]]:
    """The stages' val_bpb in groups: first what all variants share, then each variant's own."""
    shared = list(SHARED_STAGES)
    title = "Shared by all variants, not audited by itself"
    groups = [{"title": title, "badge": None, "holder": SHARED, "stages": shared}]
    for variant in results.variants:
        groups.append(
            {
                "title": variant,
                "badge": badge(results.verdict(variant)),
                "holder": variant,
                "stages": STAGES[len(shared) :],
            }
        )
    for group in groups:
        before = None if group["holder"] == SHARED else "ema"
        group["rows"] = []
        for stage in group["stages"]:
            group["rows"].append(_stage_row(results, group["holder"], stage, before))
            before = stage
    return groups


def _stage_row(results: Results, holder: str, stage: str, before: str | None) -> dict[str, Any]:
    values = [stage_bpb(results, holder, seed, stage) for seed in results.seeds]
    found = describe(values)
    change = ""
    if before is not None:
        owner = SHARED if before in SHARED_STAGES else holder
        earlier = [stage_bpb(results, owner, seed, before) for seed in results.seeds]
        change = signed(found.mean - describe(earlier).mean)
    made_by = "gptq" if stage in ("sliding", "slot") else stage
    tainted = results.is_tainted(holder, made_by)
    is_final = stage == FINAL_STAGE
    failed = is_final and results.verdict(holder) == FAIL
    return {
        "name": _adapted_name(results, holder) if is_final else STAGE_NAMES[stage],
        "values": [bits(value) for value in values],
        "score": mean_and_std(found.mean, found.std),
        "change": change,
        "tainted": tainted,
        "valid": not (tainted or failed),
        "badge": badge(results.verdict(holder)) if is_final else None,
    }


def _adapted_name(results: Results, variant: str) -> str:
    if _tracks(results, variant) == ["fixed predictor"]:
        return "Without adapters"
    names = joined(map(adapter_name, results.adapters(variant)))
    return f"Adapted by {names}" if names else "Adapted"


def _outcome(results: Results, variant: str, name: str) -> dict[str, Any]:
    """One check of a variant: a badge for each seed, and the gravest verdict's sentence."""
    by_seed = results.checks(variant)[name]
    gravity = {FAIL: 0, PASS: 2}
    seed = min(by_seed, key=lambda one: gravity.get(by_seed[one].verdict, 1))
    same = [str(one) for one in by_seed if by_seed[one].verdict == by_seed[seed].verdict]
    plural = "seeds" if len(same) > 1 else "seed"
    return {
        "title": check_title(name),
        "badges": [
            badge(by_seed[one].verdict) if one in by_seed else None for one in results.seeds
        ],
        "sentence": by_seed[seed].sentence,
        "where": "every seed" if len(same) == len(results.seeds) else f"{plural} {joined(same)}",
        "quoted_seed": seed,
    }


def _audit(results: Results, variant: str) -> dict[str, Any]:
    audits = [results.audits[variant, seed] for seed in results.seeds]
    return {
        "variant": variant,
        "badge": badge(results.verdict(variant)),
        "rows": [_outcome(results, variant, name) for name in results.checks(variant)],
        "track": joined(TRACKS.get(track, track) for track in _tracks(results, variant)),
        "meanings": sorted({audit.meaning_of_pass for audit in audits}),
    }


def _budgets(results: Results, budgets: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for (variant, name), group in budgets.groupby(["variant", "budget"], sort=False):
        limit, most, unit = group["limit"].iloc[0], group["used"].max(), group["unit"].iloc[0]
        rows.append(
            {
                "variant": variant,
                "name": BUDGET_NAMES[name],
                "values": [quantity(used, unit) for used in group["used"]],
                "limit": quantity(limit, unit),
                "share": f"{most / limit:.1%}",
                "within": bool(most <= limit),
            }
        )
    return rows


def _provenance(results: Results) -> list[dict[str, str]]:
    """What each stage was made from, for the first seed; the others differ in the seed only."""
    seed, rows = results.seeds[0], []
    for (holder, one_seed, stage), record in results.provenance.items():
        if one_seed == seed:
            rows.append(
                {
                    "stage": stage,
                    "variant": holder,
                    "splits": ", ".join(record["splits"]) or "none",
                    "tainted": "val" in record["splits"] and stage != "audit",
                    "settings": sha256_of_json(record["settings"])[:12],
                    "commit": _short_commit(record["git_commit"]),
                }
            )
    return rows


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "not in a git checkout"
    digits, _, dirty = commit.partition("-")
    return digits[:12] + (" with local changes" if dirty else "")


def _identity(results: Results) -> dict[str, Any]:
    """Commits, versions and the hash over every stage's settings, independent of key order."""
    records = results.provenance
    commits = sorted({record["git_commit"] or "" for record in records.values()})
    settings = {
        f"{holder} {stage}": record["settings"] for (holder, _, stage), record in records.items()
    }
    versions: dict[str, set[str]] = {}
    for record in records.values():
        for package, version in record["versions"].items():
            versions.setdefault(package, set()).add(version)
    return {
        "commits": [_short_commit(commit or None) for commit in commits],
        "checkout": commits[0].partition("-")[0] if len(commits) == 1 else "",
        "settings_hash": sha256_of_json(settings),
        "versions": {name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
    }
