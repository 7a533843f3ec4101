"""The page's section on adaptation: what it changes, which adapter gains it, and on which targets.

Texts and numbers as page.html.j2 prints them. A change is negative where it is better, a gain
positive.
"""

import math
from typing import Any

import pandas as pd

from fairway.report.format import (
    adapter_name,
    badge,
    bits,
    count,
    interval,
    probability,
    signed,
)
from fairway.report.results import FAIL, Results
from fairway.report.statistics import describe
from fairway.report.tables import gain_bpb
from fairway.report.token_sums import TokenSums, gain_nats, saved_nats


def changes_of(comparisons: pd.DataFrame, variant: str) -> pd.DataFrame:
    """A variant's rows against its own plain sliding window: one per seed, last that of all."""
    return comparisons[comparisons["variant"] == variant]


def changes_by_seed(results: Results, comparisons: pd.DataFrame) -> list[dict[str, Any]]:
    """Each seed's change against the plain sliding window of the same artifact, by variant."""
    groups = []
    for variant in results.variants:
        changes = changes_of(comparisons, variant)
        shown = changes if len(results.seeds) > 1 else changes[:1]
        rows = [
            {
                "label": "all seeds" if pd.isna(row["seed"]) else f"seed {row['seed']}",
                "estimate": signed(row["estimate"]),
                "standard_error": bits(row["standard_error"]),
                "interval": interval(row["ci_low"], row["ci_high"], signed),
                "p": probability(row["p_not_below"]),
                "documents": count(row["documents"]),
            }
            for row in shown.to_dict("records")
        ]
        groups.append(_heading(results, variant) | {"rows": rows})
    return groups


def comparisons_of_variants(results: Results, comparisons: pd.DataFrame) -> list[dict[str, Any]]:
    """The differences between variants' final scores."""
    rows = []
    for row in comparisons[comparisons["variant"].isna()].to_dict("records"):
        pair = [row[side].rsplit(" ", 1)[0] for side in ("name", "reference")]
        rows.append(
            {
                "label": " − ".join(pair),
                "estimate": signed(row["estimate"]),
                "standard_error": bits(row["standard_error"]),
                "interval": interval(row["ci_low"], row["ci_high"], signed),
                "p": probability(row["p"]),
                "documents": count(row["documents"]),
                "valid": all(results.verdict(variant) != FAIL for variant in pair),
            }
        )
    return rows


def gains_by_adapter(results: Results) -> list[dict[str, Any]]:
    """What each adapter and all together gain over the stream: by seed, and mean ± std."""
    groups = []
    for variant in results.variants:
        adapters = results.adapters(variant)
        rows = []
        for adapter in adapters if len(adapters) == 1 else (*adapters, None):
            name = adapter_name(adapter) if adapter else "in all"
            sums = [results.tokens[variant, seed] for seed in results.seeds]
            bpb = [gain_bpb(one, adapter) for one in sums]
            nats = [_gain_per_token(one, adapter) for one in sums]
            rows += [_gain_row(name, "bits per byte", bpb), _gain_row("", "nats per token", nats)]
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


def _heading(results: Results, variant: str) -> dict[str, Any]:
    verdict = results.verdict(variant)
    return {"variant": variant, "badge": badge(verdict), "valid": verdict != FAIL}


def attribution(results: Results, variant: str) -> dict[str, Any]:
    """Mean over seeds of the gain, split by whether targets were in the loss of their own delta."""
    sums = [
        results.tokens[variant, seed].by_own_loss.reindex([False, True]) for seed in results.seeds
    ]
    mean = sum(sums[1:], sums[0]).fillna(0) / len(sums)
    saved = mean["nats_before"] - mean["nats_after"]
    gains = gain_nats(mean)
    share = mean["tokens"] / mean["tokens"].sum()
    return {
        "variant": variant,
        "badge": badge(results.verdict(variant)),
        "total": signed(saved.sum() / mean["tokens"].sum()),
        "rows": [
            {
                "label": "in the loss of their own delta" if own else "not in that loss",
                "share": f"{share[own]:.1%}",
                "gain": "–" if math.isnan(gains[own]) else signed(gains[own]),
                "part": signed(saved[own] / mean["tokens"].sum()),
            }
            for own in (True, False)
        ],
    }
