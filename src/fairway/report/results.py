"""A run's finished stages, read from their folders: everything the report knows.

Nothing is believed for its place: each file is held against the provenance.json beside it, that
against the stage and seed of its folder and against those of the stages that it builds on, as they
lie there now. So no file of another seed, variant or run slips in, and an audit's verdict stands
beside the artifact and the scores that it is about. The audit's provenance.json is the last; no
other lists it, so its own checksum must do.

Nothing is computed here except sums over tokens.parquet, which must be what metrics.json says. A
stage that several variants share is read once; they all refer to the same objects.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from fairway.audit.interface import FAIL, Check
from fairway.audit.result import GRAVITY, AuditRecord
from fairway.data.manifest_fields import Manifest, read_manifest
from fairway.errors import UserError
from fairway.files import open_table, read_table, require_file, sha256_of
from fairway.metrics import read_metrics
from fairway.provenance import PROVENANCE, Provenance, check_product, read_provenance
from fairway.records import read_record
from fairway.report.token_sums import TokenSums, read_token_sums, saved_nats
from fairway.stages import STAGES, made_by, stages_per
from fairway.training import curve

FINAL_STAGE = next(stage.name for stage in STAGES.values() if stage.charged == "evaluation")
"""The stage whose score is the run's."""
SLIDING = "sliding"
"""The final stage's windows before adaptation: scored there, shown as a stage of their own."""
FILES_READ = {
    "train": ("metrics.parquet",),
    "gptq": ("artifact.bin", "layers.parquet"),
    FINAL_STAGE: ("tokens.parquet",),
    "audit": ("audit.json", "reach.parquet"),
}
"""The files that are read of a stage's folder besides its records; of the artifact, the hash."""
AUDITED = ("metrics.json", "artifact.bin", "tokens.parquet")
"""Of them, those that the audit reads of other stages."""
LAYER_COLUMNS = {
    "matrix": "int64",
    "error": "float64",
    "zeros": "int64",
    "bits_per_code": "float64",
}
REACH_COLUMNS = {
    "distance_tokens": "int64",
    "pairs": "int64",
    "changed": "int64",
    "largest_change_nats": "float64",
}

FEW_VARIANTS = 4
"""More variants than these do not each get panels and an open audit of their own on the page."""

Read = TypeVar("Read")


def stage_of(stage: str) -> str:
    """The stage itself; of SLIDING the one that scored it."""
    return FINAL_STAGE if stage == SLIDING else stage


@dataclass(frozen=True)
class Results:
    """All that a run's files say; keys are (variant, seed, stage) or (variant, seed)."""

    run: str
    path: Path
    """The run's folder."""
    seeds: tuple[int, ...]
    folders: Mapping[str, Mapping[str, str]]
    """By variant and stage: the folder under seed-<s> that holds the stage for the variant."""
    manifests: Mapping[str, Manifest]
    """By variant: its dataset's."""
    files: Mapping[Path, str]
    """SHA-256 of every file that was read."""
    metrics: Mapping[tuple[str, int, str], dict[str, Any]]
    """metrics.json as it is."""
    provenance: Mapping[tuple[str, int, str], Provenance]
    """provenance.json."""
    curves: Mapping[tuple[str, int], pd.DataFrame]
    """metrics.parquet; `curve.Row` describes its columns."""
    layers: Mapping[tuple[str, int], pd.DataFrame]
    """`bank`, LAYER_COLUMNS and the quantizer's own columns, one row for each matrix."""
    tokens: Mapping[tuple[str, int], TokenSums]
    """tokens.parquet, summed."""
    audits: Mapping[tuple[str, int], AuditRecord]
    """audit.json."""
    reach: Mapping[tuple[str, int], pd.DataFrame]
    """REACH_COLUMNS, one row for each distance."""

    @property
    def variants(self) -> tuple[str, ...]:
        """In the order given."""
        return tuple(self.folders)

    @property
    def datasets(self) -> dict[str, str]:
        """By variant: its dataset's name."""
        return {variant: manifest.name for variant, manifest in self.manifests.items()}

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
        return self.folders[variant][stage_of(stage)]

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
        return min(found, key=GRAVITY.index)

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
        made = stage_of(stage)
        return any("val" in self.provenance[variant, seed, made].splits for seed in self.seeds)


@dataclass(frozen=True)
class _Folder:
    """A stage's folder that holds what its provenance.json lists. hashes: of the files read."""

    path: Path
    seed: int
    record: Provenance
    hashes: Mapping[Path, str]

    @property
    def stage(self) -> str:
        return self.path.name

    @property
    def made_by(self) -> str:
        return made_by(self.stage, again=True)


def read_results(
    run_folder: Path,
    folders: Mapping[str, Mapping[str, str]],
    seeds: Sequence[int],
) -> Results:
    """Read every file of the run.

    run_folder: holds seed-<s>/<folder>/<stage>/. folders: by variant and stage.
    Raises UserError, which names the file and the stage that makes it, where one is missing or
    damaged, has changed since it was made, or belongs to another seed, variant or run.
    """
    paths = {
        (variant, seed, stage): run_folder / f"seed-{seed}" / folder / stage
        for variant, stages in folders.items()
        for seed in seeds
        for stage, folder in stages.items()
        if not STAGES[stage].on_request
    }
    seed_of = {path: seed for (_, seed, _), path in paths.items()}
    checked = {path: _checked_folder(path, seed) for path, seed in seed_of.items()}
    for (variant, seed, stage), path in paths.items():
        for need in STAGES[stage].needs:
            if STAGES[need].per == "variant":
                _require_parent(checked[path], checked[paths[variant, seed, need]])

    def of_stage(stage: str) -> dict[tuple, Path]:
        return {key[:2]: path for key, path in paths.items() if key[2] == stage}

    def read(reader: Callable[[_Folder], Read], paths: Mapping[tuple, Path]) -> dict[tuple, Read]:
        found = {path: reader(checked[path]) for path in dict.fromkeys(paths.values())}
        return {key: found[path] for key, path in paths.items()}

    evaluations, audits = of_stage(FINAL_STAGE), of_stage("audit")
    manifests = read(_checked_manifest, evaluations)
    results = Results(
        run=run_folder.name,
        path=run_folder,
        seeds=tuple(seeds),
        folders=folders,
        manifests={
            variant: read_manifest(path)
            for (variant, seed), (path, _) in manifests.items()
            if seed == seeds[0]
        },
        files={
            **dict(manifests.values()),
            **{path: sha256 for one in checked.values() for path, sha256 in one.hashes.items()},
        },
        metrics=read(_read_metrics, paths),
        provenance=read(lambda folder: folder.record, paths),
        curves=read(_table_reader(curve.TABLE, curve.COLUMNS), of_stage("train")),
        layers=read(_read_layers, of_stage("gptq")),
        tokens=read(lambda folder: read_token_sums(folder.path / "tokens.parquet"), evaluations),
        audits=read(_read_audit, audits),
        reach=read(_table_reader("reach.parquet", REACH_COLUMNS), audits),
    )
    for (variant, seed), sums in results.tokens.items():
        path = paths[variant, seed, FINAL_STAGE] / "tokens.parquet"
        metrics = results.metrics[variant, seed, FINAL_STAGE]
        _require_agreement(path, sums, metrics)
        _require_adapters(path, sums, metrics, results.adapters(variant))
    return results


def _checked_folder(path: Path, seed: int) -> _Folder:
    """A stage's folder whose files are those of its own provenance.json."""
    stage, provenance, again = path.name, path / PROVENANCE, made_by(path.name, again=True)
    files = [path / name for name in ("metrics.json", *FILES_READ.get(stage, ()))]
    for file in (provenance, *files):
        require_file(file, made_by(stage))
    record = read_provenance(provenance, again)
    if (record.stage, record.seed) != (stage, seed):
        raise UserError(
            f"{provenance} is of the {record.stage:.80} stage, seed {record.seed}: expected seed "
            f"{seed} of {again}"
        )
    hashes = {file: check_product(file, again, record) for file in files}
    return _Folder(path, seed, record, {provenance: sha256_of(provenance), **hashes})


def _require_parent(folder: _Folder, needed: _Folder) -> None:
    """A stage's provenance.json must list those that it builds on, as they lie there now; the
    audit's, which takes what is damaged, the files too."""
    names = (PROVENANCE, *(AUDITED if folder.stage == "audit" else ()))
    listed = set(folder.record.inputs.values())
    for path, digest in needed.hashes.items():
        if path.name in names and digest not in listed:
            raise UserError(
                f"{folder.path} was not made from {needed.path} as it is now: its {PROVENANCE} "
                f"does not list SHA-256 {digest[:12]} of {path}; expected the files made by "
                f"{folder.made_by}"
            )


def _checked_manifest(folder: _Folder) -> tuple[Path, str]:
    """The manifest, and its hash, of the dataset that was scored, as the evaluation lists it."""
    manifests = [
        one for one in folder.record.inputs.items() if Path(one[0]).name == "manifest.json"
    ]
    if len(manifests) != 1:
        raise UserError(
            f"{folder.path / PROVENANCE} lists {len(manifests)} files manifest.json, expected that "
            f"of the dataset, as made by {folder.made_by}"
        )
    ((name, listed),) = manifests
    manifest, again = Path(name), made_by("tokenize", again=True)
    if sha256_of(require_file(manifest, again)) != listed:
        raise UserError(
            f"{manifest} has changed since {folder.path} was made from it: expected the file made "
            f"by {again}"
        )
    return manifest, listed


def _read_metrics(folder: _Folder) -> dict[str, Any]:
    path = folder.path / "metrics.json"
    metrics = read_metrics(path, folder.stage, folder.made_by)
    _require_place(path, metrics["seed"], metrics["folder"], folder)
    return metrics


def _read_audit(folder: _Folder) -> AuditRecord:
    path = folder.path / "audit.json"
    audit = read_record(AuditRecord, path, folder.made_by)
    _require_place(path, audit.seed, audit.variant, folder)
    return audit


def _require_place(path: Path, seed: int | None, name: str | None, folder: _Folder) -> None:
    if (seed, name) != (folder.seed, folder.path.parent.name):
        raise UserError(
            f"{path} is of seed {seed} and folder {name!r:.80}: expected seed {folder.seed} and "
            f"folder {folder.path.parent.name!r}, as made by {folder.made_by}"
        )


def _table_reader(name: str, columns: Mapping[str, str]) -> Callable[[_Folder], pd.DataFrame]:
    return lambda folder: read_table(folder.path / name, folder.made_by, columns)


def _read_layers(folder: _Folder) -> pd.DataFrame:
    open_table(folder.path / "layers.parquet", folder.made_by, ["bank"])  # text of either width
    return _table_reader("layers.parquet", LAYER_COLUMNS)(folder)


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
