"""A run's finished stages, read from their folders: everything the report knows.

Nothing is computed here except sums over tokens.parquet, which are held against the stage's own
metrics so that a table from another run cannot slip in.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fairway.errors import UserError
from fairway.files import read_json, require_file
from fairway.report.token_sums import TokenSums, read_token_sums, saved_nats

# Weights that no variant changes are made once per seed; their rows carry this name.
SHARED = "shared"
SHARED_STAGES = ("train", "ema")
VARIANT_STAGES = ("ttt", "gptq", "slot", "audit")
# How a stage is built by hand, where its folder's name is not the target's.
TARGETS = {"slot": "slot_eval"}
# What is read of a stage's folder besides metrics.json and provenance.json.
EXTRA_FILES = {
    "train": ("metrics.parquet",),
    "slot": ("tokens.parquet",),
    "audit": ("audit.json", "reach.parquet"),
}
PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"


@dataclass(frozen=True)
class Check:
    """One check of one audit: its verdict and the sentence that a reviewer reads."""

    name: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Audit:
    """audit.json of one seed and variant.

    track: `adaptive` or `fixed predictor`, with adapters or without; in older records, `fixed`
    where scores are the plain model's, or `unknown`.
    meaning_of_pass: what a PASS says and what it does not.
    """

    verdict: str
    checks: tuple[Check, ...]
    track: str
    meaning_of_pass: str


@dataclass(frozen=True)
class Results:
    """All that a run's files say.

    metrics, provenance: by (variant or SHARED, seed, stage), the JSON files as they are.
    curves: by seed, columns step, loss (nats per token), lr_scale, seconds, tokens.
    tokens, audits, reach: by (variant, seed); reach has columns distance_tokens,
    pairs, changed and largest_change_nats, one row for each distance.
    dataset: metrics.json of the tokenize stage; dataset_name: its folder's name.
    """

    run: str
    seeds: tuple[int, ...]
    variants: tuple[str, ...]
    dataset_name: str
    dataset: dict[str, Any]
    metrics: dict[tuple[str, int, str], dict[str, Any]]
    provenance: dict[tuple[str, int, str], dict[str, Any]]
    curves: dict[int, pd.DataFrame]
    tokens: dict[tuple[str, int], TokenSums]
    audits: dict[tuple[str, int], Audit]
    reach: dict[tuple[str, int], pd.DataFrame]

    def verdict(self, variant: str) -> str:
        """The gravest verdict of any seed: one seed that fails makes the variant's mean invalid."""
        found = [self.audits[variant, seed].verdict for seed in self.seeds]
        return FAIL if FAIL in found else PASS if set(found) == {PASS} else NOT_RUN

    def adapters(self, variant: str) -> tuple[str, ...]:
        """What changes the variant's distributions, in order; none where none, or none is known."""
        return self.tokens[variant, self.seeds[0]].adapters

    def tracks(self, variant: str) -> list[str]:
        """The audits' tracks: one, unless seeds were evaluated differently."""
        return sorted({self.audits[variant, seed].track for seed in self.seeds})

    def checks(self, variant: str) -> dict[str, dict[int, Check]]:
        """Each check's outcomes by seed, in the audit's order."""
        found: dict[str, dict[int, Check]] = {}
        for seed in self.seeds:
            for check in self.audits[variant, seed].checks:
                found.setdefault(check.name, {})[seed] = check
        return found

    def checks_with(self, variant: str, verdict: str) -> list[str]:
        """Names of the checks that came out so for at least one seed."""
        found = self.checks(variant).items()
        return [name for name, one in found if verdict in {c.verdict for c in one.values()}]

    def is_tainted(self, variant: str, stage: str) -> bool:
        """Whether validation tokens are in the ancestry of what the stage made, for any seed."""
        holder = variant if stage in VARIANT_STAGES else SHARED
        return any("val" in self.provenance[holder, seed, stage]["splits"] for seed in self.seeds)


def read_results(
    run_folder: Path, data_folder: Path, seeds: list[int], variants: list[str]
) -> Results:
    """Read every file of the run; UserError names a missing one and the stage that makes it."""
    places = _stage_folders(run_folder, seeds, variants)
    metrics = {key: _read(place / "metrics.json", key[2]) for key, place in places.items()}
    provenance = {key: _read(place / "provenance.json", key[2]) for key, place in places.items()}
    pairs = [(variant, seed) for variant in variants for seed in seeds]
    slot = {pair: places[*pair, "slot"] / "tokens.parquet" for pair in pairs}
    audit = {pair: places[*pair, "audit"] for pair in pairs}
    tokens = {pair: read_token_sums(_require(path, "slot")) for pair, path in slot.items()}
    for pair, sums in tokens.items():
        _require_agreement(slot[pair], sums, metrics[*pair, "slot"])
        _require_adapters(slot[pair], sums, tokens[pair[0], seeds[0]])
    return Results(
        run=run_folder.name,
        seeds=tuple(seeds),
        variants=tuple(variants),
        dataset_name=data_folder.name,
        dataset=_read(data_folder / "metrics.json", "tokenize"),
        metrics=metrics,
        provenance=provenance,
        curves={seed: _read_curve(places[SHARED, seed, "train"]) for seed in seeds},
        tokens=tokens,
        audits={pair: _read_audit(folder / "audit.json") for pair, folder in audit.items()},
        reach={pair: _read_reach(folder / "reach.parquet") for pair, folder in audit.items()},
    )


def _stage_folders(
    run_folder: Path, seeds: list[int], variants: list[str]
) -> dict[tuple[str, int, str], Path]:
    folders = {}
    for seed in seeds:
        base = run_folder / f"seed-{seed}"
        for stage in SHARED_STAGES:
            folders[SHARED, seed, stage] = base / stage
        for variant in variants:
            for stage in VARIANT_STAGES:
                folders[variant, seed, stage] = base / variant / stage
    return folders


def _require(path: Path, stage: str) -> Path:
    target = TARGETS.get(stage, stage)
    return require_file(path, f"the {target} stage; run `snakemake --cores 2 {target}`")


def _read(path: Path, stage: str) -> dict[str, Any]:
    return read_json(_require(path, stage))


def _read_curve(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(_require(folder / "metrics.parquet", "train"))


def _read_reach(path: Path) -> pd.DataFrame:
    return pd.read_parquet(_require(path, "audit"))


def _read_audit(path: Path) -> Audit:
    record = _read(path, "audit")
    checks = record["checks"]
    return Audit(
        verdict=record["verdict"],
        checks=tuple(Check(one["name"], one["verdict"], one["sentence"]) for one in checks),
        track=record["track"],
        meaning_of_pass=record["meaning_of_pass"],
    )


def _require_agreement(path: Path, sums: TokenSums, metrics: dict[str, Any]) -> None:
    """The table's totals must be the ones that metrics.json reports."""
    total = sums.total()
    loss = total["nats_after"] / total["tokens"]
    if not math.isclose(loss, metrics["val_loss"], rel_tol=1e-6):
        raise UserError(
            f"{path} sums to {loss:.6f} nats per token but its metrics.json says "
            f"{metrics['val_loss']:.6f}: rerun the slot_eval stage"
        )


def _require_adapters(path: Path, sums: TokenSums, first: TokenSums) -> None:
    """Every seed has the adapters of the `first`, whose gains add up to what was gained in all."""
    if sums.adapters != first.adapters:
        raise UserError(
            f"{path} has gains of the adapters {list(sums.adapters)}, the first seed's of "
            f"{list(first.adapters)}: rerun the slot_eval stage for all seeds"
        )
    total = sums.total()
    parts = sum(saved_nats(total, name) for name in sums.adapters) / total["tokens"]
    gained = saved_nats(total) / total["tokens"]
    if sums.adapters and not math.isclose(parts, gained, rel_tol=1e-6, abs_tol=1e-6):
        raise UserError(
            f"{path} has gains by adapter of {parts:.6f} nats per token together, but the losses "
            f"differ by {gained:.6f}: rerun the slot_eval stage"
        )


def input_files(run_folder: Path, data_folder: Path, results: Results) -> list[Path]:
    """The files that `read_results` read, for the report's provenance."""
    places = _stage_folders(run_folder, list(results.seeds), list(results.variants))
    files = [data_folder / "metrics.json"]
    for (_, _, stage), folder in places.items():
        files += [
            folder / name
            for name in ("metrics.json", "provenance.json", *EXTRA_FILES.get(stage, ()))
        ]
    return files
