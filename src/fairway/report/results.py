"""A run's finished stages, read from their folders: everything the report knows.

Nothing is computed here except sums over tokens.parquet, which are compared with the stage's own
metrics so that a table from another run cannot slip in. A stage that several variants share is
read once; they all refer to the same objects.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from fairway.audit.interface import FAIL, NOT_RUN, PASS, Check
from fairway.errors import UserError
from fairway.files import read_json, require_file
from fairway.report.token_sums import TokenSums, read_token_sums, saved_nats
from fairway.stages import RECORDS, STAGES, evaluation_stage, stages_per

FINAL_STAGE = evaluation_stage().name
"""The stage whose score is the run's."""
SLIDING = "sliding"
"""The final stage's windows before adaptation: scored there, shown as a stage of their own."""
TABLES_READ = {
    "train": ("metrics.parquet",),
    FINAL_STAGE: ("tokens.parquet",),
    "audit": ("audit.json", "reach.parquet"),
}
"""The files that are read of a stage's folder besides RECORDS."""

FEW_VARIANTS = 4
"""More variants than these do not each get panels and an open audit of their own on the page."""

Read = TypeVar("Read")


@dataclass(frozen=True)
class Audit:
    """audit.json of one seed and variant."""

    verdict: str
    checks: tuple[Check, ...]
    track: str
    """`fixed` where scores are the model's own, `adaptive` where the evaluator changes them."""
    meaning_of_pass: str
    """What a PASS says and what it does not."""


@dataclass(frozen=True)
class Results:
    """All that a run's files say; keys are (variant, seed, stage) or (variant, seed)."""

    run: str
    seeds: tuple[int, ...]
    folders: Mapping[str, Mapping[str, str]]
    """By variant and stage: the folder under seed-<s> that holds the stage for the variant."""
    datasets: Mapping[str, str]
    """By variant: its dataset's name."""
    metrics: Mapping[tuple[str, int, str], dict[str, Any]]
    """metrics.json as it is."""
    provenance: Mapping[tuple[str, int, str], dict[str, Any]]
    """provenance.json as it is."""
    curves: Mapping[tuple[str, int], pd.DataFrame]
    """Columns step, loss (nats per token), lr_scale, seconds, tokens."""
    tokens: Mapping[tuple[str, int], TokenSums]
    """tokens.parquet, summed."""
    audits: Mapping[tuple[str, int], Audit]
    reach: Mapping[tuple[str, int], pd.DataFrame]
    """Columns distance_tokens, pairs, changed, largest_change_nats; one row for each distance."""

    @property
    def variants(self) -> tuple[str, ...]:
        """In the order given: the first is the one that many others are compared with."""
        return tuple(self.folders)

    @property
    def has_few_variants(self) -> bool:
        """Whether there is room for each variant by itself."""
        return len(self.folders) <= FEW_VARIANTS

    @property
    def stages(self) -> list[str]:
        """Those that run once a seed and variant, in the order of the table of stages."""
        return [stage.name for stage in stages_per("variant")]

    @property
    def score_stages(self) -> list[str]:
        """The stages that have a val_bpb, in order; SLIDING comes before FINAL_STAGE."""
        stages = [stage for stage in self.stages if STAGES[stage].scores]
        stages.insert(stages.index(FINAL_STAGE), SLIDING)
        return stages

    def folder(self, variant: str, stage: str) -> str:
        """Where the stage lies under seed-<s>; SLIDING lies with FINAL_STAGE."""
        return self.folders[variant][FINAL_STAGE if stage == SLIDING else stage]

    def sharers(self, variant: str, stage: str) -> tuple[str, ...]:
        """The variants that use the same run of the stage."""
        folder = self.folder(variant, stage)
        return tuple(one for one in self.variants if self.folder(one, stage) == folder)

    def stages_by_sharers(self) -> dict[tuple[str, ...], list[str]]:
        """Every stage once, under the variants that share it: most shared ones first.

        The variants that share a stage also share all stages before it.
        """
        found: dict[tuple[str, ...], list[str]] = {}
        for variant in self.variants:
            for stage in self.stages:
                stages = found.setdefault(self.sharers(variant, stage), [])
                if stage not in stages:
                    stages.append(stage)
        return dict(sorted(found.items(), key=lambda one: -len(one[0])))

    def name_of(self, sharers: Sequence[str], stage: str) -> str:
        """What to call the variants that share a stage: their folder where they are only some."""
        if len(sharers) == 1:
            return sharers[0]
        if len(sharers) == len(self.variants):
            return "all variants"
        return f"{len(sharers)} variants in {self.folder(sharers[0], stage)}"

    def verdict(self, variant: str) -> str:
        """The gravest verdict of any seed: one seed that fails makes the variant's mean invalid."""
        found = [self.audits[variant, seed].verdict for seed in self.seeds]
        return FAIL if FAIL in found else PASS if set(found) == {PASS} else NOT_RUN

    def failed(self, variant: str) -> bool:
        """Whether the variant's score is no valid one."""
        return self.verdict(variant) == FAIL

    def adapters(self, variant: str) -> dict[str, str]:
        """Names and titles of what changes the variant's distributions, in the order they act."""
        listed = self.metrics[variant, self.seeds[0], FINAL_STAGE]["adapters"]
        return {one["name"]: one["title"] for one in listed}

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
        """Whether the stage's product has validation tokens in its ancestry, for any seed."""
        made_by = FINAL_STAGE if stage == SLIDING else stage
        return any(
            "val" in self.provenance[variant, seed, made_by]["splits"] for seed in self.seeds
        )


def read_results(
    run_folder: Path,
    folders: Mapping[str, Mapping[str, str]],
    seeds: Sequence[int],
    datasets: Mapping[str, str],
) -> Results:
    """Read every file of the run; UserError names a missing one and the stage that makes it.

    run_folder: holds seed-<s>/<folder>/<stage>/. folders: by variant and stage. datasets: the name
    of each variant's dataset.
    """
    paths = _stage_paths(run_folder, folders, seeds)

    def read(reader: Callable[[Path], Read], stage: str, name: str) -> dict[tuple, Read]:
        wanted = {key[:2]: path / name for key, path in paths.items() if key[2] == stage}
        return _read_once(reader, wanted)

    results = Results(
        run=run_folder.name,
        seeds=tuple(seeds),
        folders=folders,
        datasets=datasets,
        metrics=_read_once(_read_json, {key: path / RECORDS[0] for key, path in paths.items()}),
        provenance=_read_once(_read_json, {key: path / RECORDS[1] for key, path in paths.items()}),
        curves=read(_read_table, "train", "metrics.parquet"),
        tokens=read(lambda path: read_token_sums(_require(path)), FINAL_STAGE, "tokens.parquet"),
        audits=read(_read_audit, "audit", "audit.json"),
        reach=read(_read_table, "audit", "reach.parquet"),
    )
    for (variant, seed), sums in results.tokens.items():
        path = paths[variant, seed, FINAL_STAGE] / "tokens.parquet"
        metrics = results.metrics[variant, seed, FINAL_STAGE]
        _require_agreement(path, sums, metrics)
        _require_adapters(path, sums, metrics, results.adapters(variant))
    return results


def input_files(
    run_folder: Path, folders: Mapping[str, Mapping[str, str]], seeds: Sequence[int]
) -> list[Path]:
    """The files that `read_results` reads, for the report's provenance."""
    paths = {path: stage for (*_, stage), path in _stage_paths(run_folder, folders, seeds).items()}
    return [
        path / name
        for path, stage in paths.items()
        for name in (*RECORDS, *TABLES_READ.get(stage, ()))
    ]


def _stage_paths(
    run_folder: Path, folders: Mapping[str, Mapping[str, str]], seeds: Sequence[int]
) -> dict[tuple[str, int, str], Path]:
    return {
        (variant, seed, stage): run_folder / f"seed-{seed}" / folder / stage
        for variant, stages in folders.items()
        for seed in seeds
        for stage, folder in stages.items()
    }


def _read_once(reader: Callable[[Path], Read], paths: Mapping[tuple, Path]) -> dict[tuple, Read]:
    read = {path: reader(path) for path in dict.fromkeys(paths.values())}
    return {key: read[path] for key, path in paths.items()}


def _require(path: Path) -> Path:
    stage = path.parent.name
    return require_file(path, f"the {stage} stage; run `snakemake --cores 2 {stage}`")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(_require(path))


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(_require(path))


def _read_audit(path: Path) -> Audit:
    found = _read_json(path)
    checks = found["checks"]
    return Audit(
        verdict=found["verdict"],
        checks=tuple(Check(one["name"], one["verdict"], one["sentence"]) for one in checks),
        track=found["track"],
        meaning_of_pass=found["meaning_of_pass"],
    )


def _require_agreement(path: Path, sums: TokenSums, metrics: Mapping[str, Any]) -> None:
    """The table's totals must be the ones that metrics.json reports."""
    total = sums.total()
    loss = total["nats_after"] / total["tokens"]
    if not math.isclose(loss, metrics["val_loss"], rel_tol=1e-6):
        raise UserError(
            f"{path} sums to {loss:.6f} nats per token but its metrics.json says "
            f"{metrics['val_loss']:.6f}: rerun the {FINAL_STAGE} stage"
        )


def _require_adapters(
    path: Path, sums: TokenSums, metrics: Mapping[str, Any], first: Mapping[str, str]
) -> None:
    """The table's adapters are its metrics' and the first seed's; their gains sum to the change."""
    listed = [one["name"] for one in metrics["adapters"]]
    for names, whose in ((listed, "its metrics.json lists"), (list(first), "the first seed's of")):
        if list(sums.adapters) != names:
            raise UserError(
                f"{path} has gains of the adapters {list(sums.adapters)}, {whose} {names}: rerun "
                f"the {FINAL_STAGE} stage for all seeds"
            )
    total = sums.total()
    parts = sum(saved_nats(total, name) for name in listed) / total["tokens"]
    gained = saved_nats(total) / total["tokens"]
    if not math.isclose(parts, gained, rel_tol=1e-6, abs_tol=1e-6):
        raise UserError(
            f"{path} has gains by adapter of {parts:.6f} nats per token together, but the losses "
            f"differ by {gained:.6f}: rerun the {FINAL_STAGE} stage"
        )
