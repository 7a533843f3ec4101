"""stages.parquet, summary.parquet and comparisons.parquet: the run's numbers as tidy tables."""

import math
import zlib
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from fairway.errors import UserError
from fairway.evaluation.bits_per_byte import bits_per_byte
from fairway.report.results import SHARED, Results
from fairway.report.statistics import (
    bootstrap_bpb_difference,
    describe,
    welch_gain,
)
from fairway.report.token_sums import TokenSums, gain_nats, saved_nats

STAGES = ("train", "ema", "ttt", "gptq", "sliding", "slot")  # in the order they are scored
FINAL_STAGE = "slot"
UNITS = {
    "val_loss": "nats/token",
    "val_bpb": "bits/byte",
    "seconds": "s",
    "bytes": "bytes",
    "tokens": "tokens",
    "nats": "nats/token",
    "bpb": "bits/byte",
    **{f"change_bpb_{name}": "bits/byte" for name in ("standard_error", "ci_low", "ci_high")},
}
# A seed's bootstrap as metrics of its slot stage: these are columns of the comparisons table.
CHANGE_METRICS = {
    "change_bpb": "estimate",
    "change_bpb_standard_error": "standard_error",
    "change_bpb_ci_low": "ci_low",
    "change_bpb_ci_high": "ci_high",
    "change_bpb_p": "p_not_below",
}
# Of these a mean over seeds would say nothing.
NOT_SUMMARISED = tuple(metric for metric in CHANGE_METRICS if metric != "change_bpb")
ALL_ADAPTERS = "all"


@dataclass(frozen=True)
class ReportSettings:
    """The `report` section of the config.

    baseline: name and per-seed losses (nats per token) of what the run must beat, or None.
    minimum_gain_nats: by how much it must, in nats per token. significance: the one-sided p below
    which the report says that it does.
    """

    baseline: dict[str, Any] | None
    minimum_gain_nats: float
    significance: float

    def __post_init__(self) -> None:
        losses = self.baseline["losses"] if self.baseline else []
        if not all(math.isfinite(loss) for loss in losses):
            raise UserError(f"report.baseline.losses holds {losses}, expected finite numbers")


@dataclass(frozen=True)
class Budgets:
    """The `budgets` section of the config: the challenge's three limits."""

    artifact_bytes: int
    training_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Tables:
    """The tables of one report; their columns are told at the functions of the same names."""

    stages: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    gains: pd.DataFrame
    budgets: pd.DataFrame


def make_tables(results: Results, settings: ReportSettings, budgets: Budgets) -> Tables:
    """All of them, from one run's results."""
    comparisons = comparisons_table(results)
    stages = stages_table(results, comparisons)
    return Tables(
        stages=stages,
        summary=summary_table(stages, results, settings),
        comparisons=comparisons,
        gains=gains_table(results),
        budgets=budgets_table(results, budgets),
    )


def stages_table(results: Results, comparisons: pd.DataFrame) -> pd.DataFrame:
    """One row per number: run, variant, seed, stage, metric, value (float64), unit.

    `train` and `ema` are made once per seed, for every variant: their variant is `shared`. The
    slot stage gives two: `sliding`, its own windows before adaptation, and `slot`, after it, with
    what each adapter gained (gain_<adapter>_bpb; the stage itself says gain_<adapter>_nats) and
    the bootstrap of their difference (change_bpb, …; change_bpb_p is one-sided, that the change is
    not below zero). comparisons: the table of `comparisons_table`.
    """
    rows = []
    for (variant, seed, stage), metrics in results.metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and metric != "seed":
                rows.append((variant, seed, stage, metric, float(value)))
    for (variant, seed), sums in results.tokens.items():
        for metric, value in sliding_metrics(sums).items():
            rows.append((variant, seed, "sliding", metric, value))
        for adapter in sums.adapters:
            rows.append((variant, seed, "slot", f"gain_{adapter}_bpb", gain_bpb(sums, adapter)))
    for change in comparisons[comparisons["seed"].notna()].to_dict("records"):
        key = (change["variant"], change["seed"], "slot")
        rows += [(*key, metric, change[name]) for metric, name in CHANGE_METRICS.items()]
    table = pd.DataFrame(rows, columns=["variant", "seed", "stage", "metric", "value"])
    table.insert(0, "run", results.run)
    table["unit"] = table["metric"].map(unit_of)
    return table


def sliding_metrics(sums: TokenSums) -> dict[str, float]:
    """The unadapted windows' val_loss, val_bpb, tokens and bytes."""
    total = sums.total()
    return {
        "val_loss": total["nats_before"] / total["tokens"],
        "val_bpb": bits_per_byte(total["nats_before"], total["bytes"]),
        "tokens": float(total["tokens"]),
        "bytes": float(total["bytes"]),
    }


def gain_bpb(sums: TokenSums, adapter: str | None = None) -> float:
    """Bits per byte of the stream that one adapter, or all together, saved; positive is better."""
    total = sums.total()
    return bits_per_byte(saved_nats(total, adapter), total["bytes"])


def stage_bpb(results: Results, holder: str, seed: int, stage: str) -> float:
    """val_bpb of one of STAGES; holder: a variant, or `shared`."""
    if stage == "sliding":
        return sliding_metrics(results.tokens[holder, seed])["val_bpb"]
    return results.metrics[holder, seed, stage]["val_bpb"]


def unit_of(metric: str) -> str:
    """A metric's unit, by its name or its last word; "1" for counts and ratios."""
    return UNITS.get(metric) or UNITS.get(metric.rsplit("_", 1)[-1], "1")


def summary_table(stages: pd.DataFrame, results: Results, settings: ReportSettings) -> pd.DataFrame:
    """Seed statistics: one row per variant, stage and metric.

    Columns: n, mean, std (ddof 1), standard_error, ci_low and ci_high (95 % t-interval); the
    audit's `verdict` on the variant (null for `shared`); and for the final stage's val_loss
    against the config's baseline, in nats per token: difference_nats (mean minus the baseline's,
    negative is better), welch_t, welch_degrees_of_freedom and welch_p, one-sided, that the gain
    exceeds `minimum_gain_nats`. Where a number cannot be had (one seed, no baseline) it is null.
    The metrics NOT_SUMMARISED are left out.
    """
    rows = []
    stages = stages[~stages["metric"].isin(NOT_SUMMARISED)]
    keys = ["run", "variant", "stage", "metric", "unit"]
    for group, values in stages.groupby(keys, sort=False)["value"]:
        row = dict(zip(keys, group, strict=True)) | asdict(describe(values.to_numpy()))
        row["verdict"] = None if row["variant"] == SHARED else results.verdict(row["variant"])
        is_score = row["stage"] == FINAL_STAGE and row["metric"] == "val_loss"
        rows.append(row | _against_baseline(values.to_numpy() if is_score else None, settings))
    return pd.DataFrame(rows)


def _against_baseline(losses: np.ndarray | None, settings: ReportSettings) -> dict[str, float]:
    names = ("difference_nats", "welch_t", "welch_degrees_of_freedom", "welch_p")
    if losses is None or settings.baseline is None:
        return dict.fromkeys(names, math.nan)
    test = welch_gain(losses, settings.baseline["losses"], settings.minimum_gain_nats)
    return dict(zip(names, (test.difference, test.t, test.degrees_of_freedom, test.p), strict=True))


def comparisons_table(results: Results) -> pd.DataFrame:
    """Paired differences in bits per byte, bootstrapped over the stream's documents.

    For each variant, its slot stage against the plain sliding window of the same artifact: one row
    per seed, and one of all seeds (`seed` null). For each pair of variants, their slot stages: of
    all seeds. Where it is of all seeds, their losses are averaged per document first, so the
    interval is about the text, not the seeds. Columns: run, variant (null for a pair), seed, name,
    reference, and those of `statistics.Bootstrap`.
    """
    byte_counts = _common_bytes(results).to_numpy()
    before, after = (_document_nats(results, name) for name in ("nats_before", "nats_after"))
    cases = []
    for variant in results.variants:
        names = (f"{variant} slot", f"{variant} sliding")
        for seed in (*results.seeds, None):
            pair = (after[variant, seed], before[variant, seed])
            cases.append(((variant, seed, *names), pair))
    for first, second in combinations(results.variants, 2):
        names = (f"{second} slot", f"{first} slot")
        cases.append(((None, None, *names), (after[second, None], after[first, None])))
    rows = []
    for (variant, seed, name, reference), (nats, reference_nats) in cases:
        draws = zlib.crc32(f"{name}|{reference}".encode())  # the same documents for every seed
        found = bootstrap_bpb_difference(nats, reference_nats, byte_counts, draws)
        key = {"variant": variant, "seed": seed, "name": name, "reference": reference}
        rows.append({"run": results.run} | key | asdict(found))
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def _document_nats(results: Results, column: str) -> dict[tuple[str, int | None], np.ndarray]:
    """float64 [documents], each document's summed loss: by variant and seed, None for the mean."""
    nats = {pair: sums.by_document[column].to_numpy() for pair, sums in results.tokens.items()}
    for variant in results.variants:
        nats[variant, None] = np.mean([nats[variant, seed] for seed in results.seeds], axis=0)
    return nats


def _common_bytes(results: Results) -> pd.Series:
    """The documents' bytes, which every seed and variant must have scored alike."""
    first = next(iter(results.tokens.values())).by_document["bytes"]
    for (variant, seed), sums in results.tokens.items():
        if not sums.by_document["bytes"].equals(first):
            raise UserError(
                f"variant {variant}, seed {seed} scored other text than the run's first seed: "
                "rerun the slot_eval stage for all seeds"
            )
    return first


def gains_table(results: Results) -> pd.DataFrame:
    """What each adapter gains by the target's distance from its document's start.

    Columns: run, variant, seed, adapter (ALL_ADAPTERS for all together), first_token and
    tokens: the bin's first distance and its number of targets, gain_nats per token, positive is
    better.
    """
    parts = []
    for (variant, seed), sums in results.tokens.items():
        bins = sums.by_document_position
        for adapter in (None, *sums.adapters):
            key = {"run": results.run, "variant": variant, "seed": seed}
            key["adapter"] = adapter or ALL_ADAPTERS
            part = pd.DataFrame({"tokens": bins["tokens"], "gain_nats": gain_nats(bins, adapter)})
            parts.append(part.rename_axis("first_token").reset_index().assign(**key))
    order = ["run", "variant", "seed", "adapter", "first_token", "tokens", "gain_nats"]
    return pd.concat(parts, ignore_index=True)[order]


def budgets_table(results: Results, budgets: Budgets) -> pd.DataFrame:
    """What each seed used of each budget: variant, seed, budget, used, limit, unit.

    The artifact's bytes are those of its file and of the code that scores it. Training time is that
    of every stage up to the artifact which reads training data; evaluation time is that of scoring
    the artifact.
    """
    rows = []
    for variant in results.variants:
        for seed in results.seeds:
            made_by = [(SHARED, "train"), (SHARED, "ema"), (variant, "ttt"), (variant, "gptq")]
            made = [results.metrics[holder, seed, stage] for holder, stage in made_by]
            training = sum(metrics["training_seconds"] for metrics in made)
            evaluation = results.metrics[variant, seed, "slot"]["evaluation_seconds"]
            for name, used, unit in (
                ("artifact_bytes", made[-1]["total_bytes"], "bytes"),
                ("training_seconds", training, "s"),
                ("evaluation_seconds", evaluation, "s"),
            ):
                rows.append((variant, seed, name, float(used), float(getattr(budgets, name)), unit))
    columns = ["variant", "seed", "budget", "used", "limit", "unit"]
    return pd.DataFrame(rows, columns=columns)


def reach_counts(results: Results, variant: str) -> pd.DataFrame:
    """The flip test's pairs and changes at each distance, one or more tokens back, over all seeds.

    Columns: distance_tokens, pairs, changed. Distance 0, the token's own distribution, is the
    self-influence check's and left out.
    """
    reach = pd.concat([results.reach[variant, seed] for seed in results.seeds])
    counts = reach.groupby("distance_tokens", as_index=False)[["pairs", "changed"]].sum()
    return counts[counts["distance_tokens"] > 0]


def batch_reach_tokens(results: Results, variant: str) -> int | None:
    """How far back a token can be felt where `batch_windows` windows share a delta: over the slices
    of all of them but the last, whose own slice is in no context. None where none share."""
    settings = results.provenance[variant, results.seeds[0], "slot"]["settings"]
    slot = settings.get("slot")
    if slot is None or slot["scope"] != "batch":  # left out where it is not among the adapters
        return None
    windows = settings.get("evaluation", slot)  # older runs: in the section `slot`
    return (slot["batch_windows"] - 1) * windows["stride_tokens"]


def furthest_change(reach: pd.DataFrame) -> int:
    """The largest distance, in tokens, at which anything changed; 0 where nothing did."""
    changed = reach.loc[reach["changed"] > 0, "distance_tokens"]
    return int(changed.max()) if len(changed) else 0
