"""The tables of a finished run: all its numbers, tidy, for the page and for Python."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from fairway.errors import UserError
from fairway.evaluation.bits_per_byte import bits_per_byte
from fairway.files import read_table, require_file, write_table
from fairway.provenance import check_product
from fairway.recipe import known_variant
from fairway.report.results import FINAL_STAGE, SLIDING, Results
from fairway.report.settings import ReportSettings
from fairway.report.statistics import (
    DocumentTest,
    SeedTest,
    describe,
    document_test,
    paired_test,
    welch_test,
)
from fairway.report.token_sums import TokenSums, gain_nats, saved_nats
from fairway.settings import validated
from fairway.stages import Budgets, charged_seconds, made_by

ALL_ADAPTERS = "all"
TEST_FIELDS = ("t", "degrees_of_freedom", "p")
SEED_TESTS = (
    "difference_nats",
    *(f"{kind}_{name}" for kind in ("welch", "paired") for name in TEST_FIELDS),
)
"""The columns of the comparisons that are of seeds, not of documents."""
COMPARISONS_DTYPES = {"seed": "Int64"}
"""It is null where a comparison is of all seeds."""
UNITS = {
    "val_loss": "nats/token",
    "val_bpb": "bits/byte",
    "val_bpb_original": "bits/byte",
    "seconds": "s",
    "bytes": "bytes",
    "tokens": "tokens",
    "nats": "nats/token",
    "bpb": "bits/byte",
    **{f"change_bpb_{name}": "bits/byte" for name in ("standard_error", "ci_low", "ci_high")},
}
CHANGE_METRICS = {
    "change_bpb": "estimate",
    "change_bpb_standard_error": "standard_error",
    "change_bpb_ci_low": "ci_low",
    "change_bpb_ci_high": "ci_high",
    "change_bpb_p": "p_not_below",
}
"""A seed's test over documents as metrics of the final stage, and their columns there."""
NOT_SUMMARIZED = tuple(metric for metric in CHANGE_METRICS if metric != "change_bpb")
"""A mean of these over seeds would say nothing."""


@dataclass(frozen=True)
class RunTables:
    """The tables of one run; the functions that make them describe their columns."""

    stages: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    gains: pd.DataFrame
    budgets: pd.DataFrame

    def write(self, folder: Path) -> list[Path]:
        """Write each as <name>.parquet; returns the paths."""
        paths = [folder / f"{field.name}.parquet" for field in fields(self)]
        for path in paths:
            write_table(path, getattr(self, path.stem))
        return paths


def read_run(folder: str | Path) -> RunTables:
    """The tables of a finished run's report. folder: the run's, such as results/quickstart.

    Raises UserError where a table is missing, damaged or of another report.

        tables = read_run("results/quickstart")
        scores = tables.stages.query("stage == 'slot_eval' and metric == 'val_bpb'")
        scores.pivot(index="seed", columns="variant", values="value")
    """
    tables = {}
    for field in fields(RunTables):
        path = Path(folder) / "report" / f"{field.name}.parquet"
        require_file(path, made_by("report"))
        check_product(path, made_by("report", again=True))
        tables[field.name] = read_table(path, made_by("report", again=True))
    tables["comparisons"] = tables["comparisons"].astype(COMPARISONS_DTYPES)
    return RunTables(**tables)


def make_tables(results: Results, settings: ReportSettings) -> RunTables:
    """All of them, from one run's results."""
    comparisons = comparisons_table(results, reference_of(results, settings))
    stages = stages_table(results, comparisons)
    return RunTables(
        stages=stages,
        summary=summary_table(stages, results, settings),
        comparisons=comparisons,
        gains=gains_table(results),
        budgets=budgets_table(results),
    )


def stages_table(results: Results, comparisons: pd.DataFrame) -> pd.DataFrame:
    """One row per number: run, variant, folder, seed, stage, metric, value (float64), unit.

    A stage that several variants share is there once for each, so that one variant's rows are its
    whole chain; its `folder` is the same, so `drop_duplicates(["folder", "seed", "stage",
    "metric"])` leaves each run of a stage once. The evaluation gives two stages: `sliding`, its
    windows before adaptation, and `slot_eval`, after it, with what each adapter gained
    (gain_<adapter>_bpb and gain_<adapter>_nats) and the test over documents of their difference
    (change_bpb, …; change_bpb_p is one-sided, that the change is not below zero).
    comparisons: the table of `comparisons_table`.
    """
    rows = []
    for key, metrics in results.metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and metric != "seed":
                rows.append((*key, metric, float(value)))
    for (variant, seed), sums in results.tokens.items():
        for metric, value in sliding_metrics(sums).items():
            rows.append((variant, seed, SLIDING, metric, value))
        for adapter in sums.adapters:
            gain = gain_bpb(sums, adapter)
            rows.append((variant, seed, FINAL_STAGE, f"gain_{adapter}_bpb", gain))
    for change in comparisons[comparisons["seed"].notna()].to_dict("records"):
        key = (change["variant"], change["seed"], FINAL_STAGE)
        rows += [(*key, metric, change[name]) for metric, name in CHANGE_METRICS.items()]
    table = pd.DataFrame(rows, columns=["variant", "seed", "stage", "metric", "value"])
    keys = zip(table["variant"], table["stage"], strict=True)
    table.insert(1, "folder", [results.folder(*key) for key in keys])
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
    """Bits per byte of the text that one adapter, or all together, saved; positive is better."""
    total = sums.total()
    return bits_per_byte(saved_nats(total, adapter), total["bytes"])


def gain_per_token(sums: TokenSums, adapter: str | None = None) -> float:
    """The same in nats per token."""
    total = sums.total()
    return saved_nats(total, adapter) / total["tokens"]


def scores_by_adapter(sums: TokenSums) -> list[float]:
    """val_bpb without an adapter, with the first, with the first two, and so on."""
    total = sums.total()
    saved = np.cumsum([0.0, *(saved_nats(total, adapter) for adapter in sums.adapters[:-1])])
    nats = [*(total["nats_before"] - saved), *([total["nats_after"]] if sums.adapters else [])]
    return [bits_per_byte(one, total["bytes"]) for one in nats]


def stage_bpb(results: Results, variant: str, seed: int, stage: str) -> float:
    """val_bpb of one of the results' score stages."""
    if stage == SLIDING:
        return sliding_metrics(results.tokens[variant, seed])["val_bpb"]
    return results.metrics[variant, seed, stage]["val_bpb"]


def unit_of(metric: str) -> str:
    """A metric's unit, by its name or its last word; "1" for counts and ratios."""
    return UNITS.get(metric) or UNITS.get(metric.rsplit("_", 1)[-1], "1")


def summary_table(stages: pd.DataFrame, results: Results, settings: ReportSettings) -> pd.DataFrame:
    """Seed statistics: one row per variant, stage and metric, with the stage's folder.

    Columns: n, mean, std (ddof 1), standard_error, ci_low and ci_high (95 % t-interval); `verdict`,
    the audit's on the variant; and for the final stage's val_loss against the config's baseline, in
    nats per token: difference_nats (mean minus the baseline's, negative is better), welch_t,
    welch_degrees_of_freedom and welch_p, one-sided, that the gain exceeds `minimum_gain_nats`.
    Where a number cannot be had (one seed, no baseline) it is null. NOT_SUMMARIZED are left out.
    """
    rows = []
    stages = stages[~stages["metric"].isin(NOT_SUMMARIZED)]
    keys = ["run", "variant", "folder", "stage", "metric", "unit"]
    for group, values in stages.groupby(keys, sort=False)["value"]:
        row = dict(zip(keys, group, strict=True)) | asdict(describe(values.to_numpy()))
        test = SeedTest(*[np.nan] * 4)
        is_score = row["stage"] == FINAL_STAGE and row["metric"] == "val_loss"
        if is_score and settings.baseline is not None:
            losses, margin = settings.baseline.losses, settings.minimum_gain_nats
            test = welch_test(values.to_numpy(), losses, margin, alternative="less")
        row["verdict"] = results.verdict(row["variant"])
        rows.append(row | {"difference_nats": test.difference} | _test_columns("welch", test))
    return pd.DataFrame(rows)


def _test_columns(prefix: str, test: SeedTest) -> dict[str, float]:
    return {f"{prefix}_{name}": getattr(test, name) for name in TEST_FIELDS}


def reference_of(results: Results, settings: ReportSettings) -> str:
    """The variant that the others are held against; UserError where there is none of the name."""
    if settings.against is None:
        return results.variants[0]
    return known_variant(settings.against, results.variants, "report.against: ")


def comparisons_table(results: Results, against: str) -> pd.DataFrame:
    """Differences in bits per byte: of each variant's adaptation, and between variants.

    Columns: run, variant, stage, seed, reference_variant, reference_stage; those of
    `statistics.DocumentTest`, paired by document; and between variants, over seeds: difference_nats
    per token, welch_t, welch_degrees_of_freedom, welch_p, paired_t, paired_degrees_of_freedom and
    paired_p, two-sided.

    Each variant's final stage against its own `sliding`: a row of each seed, and one of all
    (`seed` null). Its final stage against another variant's: one row of all seeds. Where it is of
    all seeds, losses are averaged per document first, so the interval is about the text. Each
    variant is compared with `against`, if both scored the same text, else with the first that
    scored its own (`variants_by_text`). Where two vocabularies cut the same text, difference_nats
    is null: their tokens are not the same.
    """
    cases = [
        (variant, FINAL_STAGE, seed, variant, SLIDING)
        for variant in results.variants
        for seed in (*results.seeds, None)
    ]
    pairs = [
        (variant, FINAL_STAGE, None, reference, FINAL_STAGE)
        for reference, variants in references(results, against).items()
        for variant in variants
        if variant != reference
    ]
    return compared(results, cases + pairs)


def compared(
    results: Results, cases: Iterable[tuple[str, str, int | None, str, str]]
) -> pd.DataFrame:
    """The rows of `comparisons_table` for cases (variant, stage, seed, reference, its stage).

    A stage is FINAL_STAGE or SLIDING; both variants must have scored the same text.
    """
    nats = {SLIDING: _document_nats(results, "nats_before")}
    nats[FINAL_STAGE] = _document_nats(results, "nats_after")
    keys = ["variant", "stage", "seed", "reference_variant", "reference_stage"]
    rows = []
    for variant, stage, seed, other, other_stage in cases:
        found = document_test(
            nats[stage][variant, seed],
            nats[other_stage][other, seed],
            _documents(results, variant)["bytes"].to_numpy(),
        )
        row = dict(zip(keys, (variant, stage, seed, other, other_stage), strict=True))
        is_of_scores = variant != other and seed is None and stage == other_stage == FINAL_STAGE
        tests = _tests_over_seeds(results, variant, other) if is_of_scores else {}
        rows.append({"run": results.run} | row | asdict(found) | tests)
    columns = ["run", *keys, *(field.name for field in fields(DocumentTest)), *SEED_TESTS]
    return pd.DataFrame(rows, columns=columns).astype(COMPARISONS_DTYPES)


def _tests_over_seeds(results: Results, variant: str, reference: str) -> dict[str, float]:
    bpb, losses = (
        [
            [results.metrics[name, seed, FINAL_STAGE][metric] for seed in results.seeds]
            for name in (variant, reference)
        ]
        for metric in ("val_bpb", "val_loss")
    )
    same_tokens = _documents(results, variant)["tokens"].equals(
        _documents(results, reference)["tokens"]
    )
    difference = np.mean(losses[0]) - np.mean(losses[1]) if same_tokens else np.nan
    return (
        {"difference_nats": float(difference)}
        | _test_columns("welch", welch_test(*bpb))
        | _test_columns("paired", paired_test(*bpb))
    )


def references(results: Results, against: str) -> dict[str, list[str]]:
    """The variants by the one that they are held against: best score first, failed ones last."""

    def rank(variant: str) -> tuple[bool, float]:
        scores = [stage_bpb(results, variant, seed, FINAL_STAGE) for seed in results.seeds]
        return results.failed(variant), float(np.mean(scores))

    groups = variants_by_text(results)
    return {against if against in group else group[0]: sorted(group, key=rank) for group in groups}


def variants_by_text(results: Results) -> list[list[str]]:
    """The variants in groups that scored the same documents, told by their numbers of bytes.

    Raises UserError where one variant's seeds scored different texts.
    """
    groups: list[list[str]] = []
    for variant in results.variants:
        text = _documents(results, variant)["bytes"]
        for seed in results.seeds:
            if not results.tokens[variant, seed].by_document["bytes"].equals(text):
                raise UserError(
                    f"variant {variant}, seed {seed} scored other text than the run's first seed: "
                    f"rerun the {FINAL_STAGE} stage for all seeds"
                )
        same = (one for one in groups if _documents(results, one[0])["bytes"].equals(text))
        group = next(same, None)
        if group is None:
            groups.append([variant])
        else:
            group.append(variant)
    return groups


def _documents(results: Results, variant: str) -> pd.DataFrame:
    return results.tokens[variant, results.seeds[0]].by_document


def _document_nats(results: Results, column: str) -> dict[tuple[str, int | None], np.ndarray]:
    """float64 [documents], each document's summed loss: by variant and seed, None for the mean."""
    nats = {pair: sums.by_document[column].to_numpy() for pair, sums in results.tokens.items()}
    for variant in results.variants:
        nats[variant, None] = np.mean([nats[variant, seed] for seed in results.seeds], axis=0)
    return nats


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


def budgets_table(results: Results) -> pd.DataFrame:
    """What each seed used of each budget: variant, seed, budget, used, limit, unit.

    The artifact's bytes are those of its file and of the code that scores it. The table of stages
    says which seconds count: training time is that of every stage which reads training data,
    evaluation time that of scoring the artifact. The limits are those that the audit tested.
    """
    rows = []
    for variant in results.variants:
        for seed in results.seeds:
            record = results.provenance[variant, seed, "audit"]
            told = f"budgets of the audit of {variant}, seed {seed}"
            limits = validated(Budgets, record.settings.get("budgets"), told)
            used = {"artifact_bytes": results.metrics[variant, seed, "gptq"]["total_bytes"]}
            used |= charged_seconds(
                {stage: results.metrics[variant, seed, stage] for stage in results.stages}
            )
            for name, amount in used.items():
                limit, unit = float(getattr(limits, name)), unit_of(name)
                rows.append((variant, seed, name, float(amount), limit, unit))
    columns = ["variant", "seed", "budget", "used", "limit", "unit"]
    return pd.DataFrame(rows, columns=columns)


def reach_counts(results: Results, variant: str) -> pd.DataFrame:
    """The flip test's pairs and changes at each distance, one or more tokens back, over all seeds.

    Columns: distance_tokens, pairs, changed. Distance 0, the token's own distribution, belongs to
    the self-influence check and is left out.
    """
    reach = pd.concat([results.reach[variant, seed] for seed in results.seeds])
    counts = reach.groupby("distance_tokens", as_index=False)[["pairs", "changed"]].sum()
    return counts[counts["distance_tokens"] > 0]


def batch_reach_tokens(results: Results, variant: str) -> int | None:
    """How far back a token can be felt where `batch_windows` windows share a fit, else None.

    That is over the slices of all of them but the last, whose own slice is in no context.
    """
    settings = results.provenance[variant, results.seeds[0], FINAL_STAGE].settings["evaluation"]
    for adapter in settings["adapters"]:
        for own in adapter.values():
            if own.get("scope") == "batch":
                return (own["batch_windows"] - 1) * settings["stride_tokens"]
    return None


def furthest_change(reach: pd.DataFrame) -> int:
    """The largest distance, in tokens, at which anything changed; 0 where nothing did."""
    changed = reach.loc[reach["changed"] > 0, "distance_tokens"]
    return int(changed.max()) if len(changed) else 0
