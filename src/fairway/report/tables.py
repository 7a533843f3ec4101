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
from fairway.report.token_sums import TokenSums

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
}


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
    budgets: pd.DataFrame


def make_tables(results: Results, settings: ReportSettings, budgets: Budgets) -> Tables:
    """All of them, from one run's results."""
    stages = stages_table(results)
    return Tables(
        stages=stages,
        summary=summary_table(stages, results, settings),
        comparisons=comparisons_table(results),
        budgets=budgets_table(results, budgets),
    )


def stages_table(results: Results) -> pd.DataFrame:
    """One row per number: run, variant, seed, stage, metric, value (float64), unit.

    `train` and `ema` are made once per seed, for every variant: their variant is `shared`. The
    slot stage gives two: `sliding`, its own windows before adaptation, and `slot`, after it.
    """
    rows = []
    for (variant, seed, stage), metrics in results.metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and metric != "seed":
                rows.append((variant, seed, stage, metric, float(value)))
    for (variant, seed), sums in results.tokens.items():
        for metric, value in sliding_metrics(sums).items():
            rows.append((variant, seed, "sliding", metric, value))
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
    """
    rows = []
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

    One row `slot − sliding` per variant, and one row per pair of variants' final scores. The
    seeds' losses are averaged per document first, so the interval is about the text, not the
    seeds. Columns: run, name, reference, estimate, ci_low, ci_high, p, documents, resamples.
    """
    nats = {}
    for variant in results.variants:
        sums = [results.tokens[variant, seed].by_document for seed in results.seeds]
        nats[variant, "sliding"] = sum(one["nats_before"] for one in sums) / len(sums)
        nats[variant, "slot"] = sum(one["nats_after"] for one in sums) / len(sums)
    byte_counts = _common_bytes(results)
    pairs = [((variant, "slot"), (variant, "sliding")) for variant in results.variants]
    pairs += [((b, "slot"), (a, "slot")) for a, b in combinations(results.variants, 2)]
    rows = []
    for name, reference in pairs:
        label = (" ".join(name), " ".join(reference))
        seed = zlib.crc32("|".join(label).encode())
        found = bootstrap_bpb_difference(
            nats[name].to_numpy(), nats[reference].to_numpy(), byte_counts.to_numpy(), seed
        )
        rows.append({"run": results.run, "name": label[0], "reference": label[1]} | asdict(found))
    return pd.DataFrame(rows)


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
    slot = results.provenance[variant, results.seeds[0], "slot"]["settings"]["slot"]
    if slot["scope"] != "batch":
        return None
    return (slot["batch_windows"] - 1) * slot["stride_tokens"]


def furthest_change(reach: pd.DataFrame) -> int:
    """The largest distance, in tokens, at which anything changed; 0 where nothing did."""
    changed = reach.loc[reach["changed"] > 0, "distance_tokens"]
    return int(changed.max()) if len(changed) else 0
