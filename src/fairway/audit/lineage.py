"""The lineage check: which data splits went into an artifact, by files that are verified.

A stage's provenance.json names its inputs and outputs with their SHA-256, the provenance files of
the stages it builds on (its parents), and the splits it read. From one of them the check follows
every ancestor, computes every hash again from the files on disk, and derives the ancestry's splits
anew: it believes nothing that it can compute. The dataset's manifest holds the hashes of its shards
and tokenizer, so these are computed as well; and it says how many validation documents occur in the
training text, which is not counted again.

Each provenance file is hashed by those that build on it. No later one hashes the first that is
visited; the check compares it with its files, its ancestors and its own settings, and the audit's
own provenance.json hashes it from then on.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pydantic import BaseModel, Field

from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, Check
from fairway.errors import UserError
from fairway.files import reading, require_file, sha256_of
from fairway.provenance import PROVENANCE, Digest, Line, Provenance, read_provenance
from fairway.records import read_record

TAINTED_SPLIT = "val"
MANIFEST_NAME = "manifest.json"
LONGEST_FAULT = 500
"""Characters of a fault in the check's sentence; the evidence has all."""


class _Hashed(BaseModel):
    sha256: Digest


class _Tokenizer(_Hashed):
    path: Line


class Overlap(BaseModel):
    """Validation documents that occur in the training text, of how many, and some of their numbers.

    exact: of which all n-grams occur. near: of which at least half do.
    """

    documents: int = Field(ge=1)
    exact: int
    near: int
    examples: list[int]

    @property
    def share(self) -> float:
        """Of the documents that occur, exactly or nearly."""
        return (self.exact + self.near) / self.documents

    def __str__(self) -> str:
        return (
            f"{self.exact + self.near:,} of {self.documents:,} validation documents occur in the "
            f"training text ({self.exact:,} exactly, {self.near:,} nearly)"
        )


class _Manifest(BaseModel):
    """What the check needs of a dataset's manifest.json."""

    shards: dict[Line, _Hashed]
    tokenizer: _Tokenizer
    overlap: Overlap | None = None


@dataclass
class _Walk:
    """What a walk through the provenance files has seen so far; a file's key is its real path."""

    hashes: dict[str, str] = field(default_factory=dict)
    records: dict[str, tuple[Path, Provenance]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    overlaps: list[Overlap | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def sha256(self, path: Path, lister: Path) -> str | None:
        """The file's hash, computed once; None, and a fault, where there is no such file."""
        key = os.path.realpath(path)
        if key not in self.hashes:
            try:
                made_by = _listed(lister)
                with reading(require_file(path, made_by), "readable", made_by):
                    self.hashes[key] = sha256_of(path)
            except UserError as error:
                self.faults.append(str(error))
        return self.hashes.get(key)

    def hash_together(self, paths: Iterable[Path]) -> None:
        """Hash those that can be read, several at a time: a training text may have 16 GB."""
        keys = dict.fromkeys(map(os.path.realpath, paths))
        files = [key for key in keys if key not in self.hashes and os.path.isfile(key)]
        with ThreadPoolExecutor() as pool:
            found = zip(files, pool.map(_sha256_if_readable, files), strict=True)
            self.hashes |= {key: sha256 for key, sha256 in found if sha256}


def _sha256_if_readable(path: str) -> str | None:
    with suppress(OSError):
        return sha256_of(path)
    return None


def _listed(lister: Path) -> str:
    return f"the run that {lister} records"


def check_lineage(
    provenance: str | Path | None, used: Iterable[Path] = (), overlap_share: float = 0.01
) -> Check:
    """PASS where every file of the ancestry has its listed hash, no stage read `val`, and no more
    than `overlap_share` of the validation documents occur in the training text.

    NOT RUN where only the last is not known.
    provenance: provenance.json of the stage that made the audited product; None where there is
    none. Paths in it are taken as given, relative to the working directory.
    used: files that the audit itself reads; a provenance file must list each.
    evidence: splits (derived), splits_by_stage, files_verified, faults, overlap (None: not known).
    """
    if provenance is None:
        return Check("lineage", NOT_APPLICABLE, "No provenance.json was given.")
    walk = _Walk()
    _read_ancestry(Path(provenance), walk)
    splits, stages = _add_up(walk)
    for path, record in walk.records.values():
        _verify_files(path, record, walk)
        _verify_parents(path, record, walk)
        _verify_settings(path, record, walk)
    for path in used:
        if os.path.realpath(path) not in walk.hashes:
            walk.faults.append(
                f"{path} was audited, but nothing in the ancestry of {provenance} lists it"
            )
    known = bool(walk.overlaps) and None not in walk.overlaps
    overlap = max(walk.overlaps, key=lambda one: one.share) if known else None
    evidence = {
        "splits": sorted(splits),
        "splits_by_stage": dict(sorted(stages.items())),
        "files_verified": len(walk.hashes),
        "faults": walk.faults,
        "overlap": overlap and {**overlap.model_dump(), "limit_share": overlap_share},
    }
    complaints = []
    if TAINTED_SPLIT in splits:
        readers = [stage for stage, read in stages.items() if TAINTED_SPLIT in read]
        by = f" (read by {', '.join(sorted(readers))})" if readers else ""
        complaints.append(f"the validation text is in the artifact's ancestry{by}")
    if overlap and overlap.share > overlap_share:
        complaints.append(f"{overlap}, {overlap.share:.1%} where {overlap_share:.1%} may")
    if walk.faults:
        more = f" and {len(walk.faults) - 1} more" if len(walk.faults) > 1 else ""
        fault = walk.faults[0][:LONGEST_FAULT]
        complaints.append(f"the provenance does not hold: {fault}{more}")
    if complaints:
        sentence = "; ".join(complaints)
        return Check("lineage", FAIL, f"{sentence[0].upper()}{sentence[1:]}.", evidence)
    sentence = (
        f"{len(walk.hashes)} files of {len(stages)} stages have the listed SHA-256, and the "
        f"ancestry read {', '.join(sorted(splits)) or 'no data'} only"
    )
    if overlap is None:
        unknown = "whether validation documents occur in the training text was not checked"
        return Check("lineage", NOT_RUN, f"{sentence}; {unknown}.", evidence)
    return Check("lineage", PASS, f"{sentence}; {overlap}.", evidence)


def _read_ancestry(first: Path, walk: _Walk) -> None:
    """Read a provenance file and all its ancestors."""
    waiting = [(first, first)]
    while waiting:
        path, lister = waiting.pop()
        key = os.path.realpath(path)
        if key in walk.seen:
            continue
        walk.seen.add(key)
        try:
            record = read_provenance(path, _listed(lister))
        except UserError as error:
            walk.faults.append(str(error))
            continue
        walk.sha256(path, lister)
        walk.records[key] = (path, record)
        waiting += [(Path(parent), path) for parent in reversed(record.parents)]


def _add_up(walk: _Walk) -> tuple[set[str], dict[str, list[str]]]:
    """The splits in the ancestry of all, and those that each stage read, by what each file says.

    A file whose ancestors do not add up to the splits that it names is a fault.
    """
    parents = {
        key: [os.path.realpath(parent) for parent in record.parents]
        for key, (_, record) in walk.records.items()
    }
    try:
        order = list(TopologicalSorter(parents).static_order())
    except CycleError as error:
        walk.faults.append(f"{error.args[1][0]} is among its own ancestors")
        order = list(parents)
    splits: dict[str, set[str]] = {}
    stages: dict[str, list[str]] = {}
    for key in order:
        if key not in walk.records:
            continue
        path, record = walk.records[key]
        stages.setdefault(record.stage, []).extend(sorted(set(record.splits_read)))
        ancestry = set(record.splits_read).union(*(splits.get(one, ()) for one in parents[key]))
        if set(record.splits) != ancestry:
            walk.faults.append(
                f"{path} says splits {sorted(record.splits)}, "
                f"its ancestors add up to {sorted(ancestry)}"
            )
        splits[key] = ancestry | set(record.splits)
    return set().union(*splits.values()), stages


def _verify_files(provenance: Path, record: Provenance, walk: _Walk) -> None:
    """Compare the listed hash of every input and output with the file on disk."""
    listed = {Path(name): sha256 for name, sha256 in record.inputs.items()}
    listed |= {provenance.parent / name: sha256 for name, sha256 in record.outputs.items()}
    for path, sha256 in listed.items():
        if _verify_file(path, sha256, provenance, walk) and path.name == MANIFEST_NAME:
            _verify_manifest(path, walk)


def _verify_file(path: Path, sha256: str, lister: Path, walk: _Walk) -> bool:
    found = walk.sha256(path, lister)
    if found not in (None, sha256):
        walk.faults.append(f"{path} is not the file listed in {lister}")
    return found == sha256


def _verify_manifest(path: Path, walk: _Walk) -> None:
    """Compare the shards and the tokenizer on disk with the hashes in the dataset's manifest."""
    key = os.path.realpath(path)
    if key in walk.seen:
        return
    walk.seen.add(key)
    try:
        manifest = read_record(_Manifest, path, "the tokenize stage")
    except UserError as error:
        walk.faults.append(str(error))
        return
    walk.overlaps.append(manifest.overlap)
    listed = {**manifest.shards, manifest.tokenizer.path: manifest.tokenizer}
    walk.hash_together(path.parent / name for name in listed)
    for name, entry in listed.items():
        _verify_file(path.parent / name, entry.sha256, path, walk)


def _verify_parents(provenance: Path, record: Provenance, walk: _Walk) -> None:
    """A stage that made an input from a data split must be in the ancestry, and each parent's hash
    be listed."""
    hashed = {os.path.realpath(name) for name in record.inputs}
    for name, sha256 in record.inputs.items():
        maker = Path(name).parent / PROVENANCE
        if os.path.realpath(maker) not in walk.records and _splits_of(Path(name), sha256, maker):
            walk.faults.append(f"{provenance} uses {name}, but {maker} is not in its ancestry")
    for parent in record.parents:
        if os.path.realpath(parent) not in hashed:
            walk.faults.append(f"{provenance} does not list the SHA-256 of its parent {parent}")


def _splits_of(path: Path, sha256: str, maker: Path) -> list[str]:
    """The splits that a provenance file beside an input says it was made from.

    None where it does not say that it made this file, as where a text lies among other products;
    none of a dataset's tokenizer, which another dataset may use.
    """
    try:
        made = read_provenance(maker, "an earlier stage")
    except UserError:
        return []
    return made.splits if made.outputs.get(path.name) == sha256 else []


def _verify_settings(provenance: Path, record: Provenance, walk: _Walk) -> None:
    """A stage whose settings say that it reads the validation text must list that split."""
    section = record.settings.get(record.stage)
    said = section.get("data") if isinstance(section, dict) else None
    if said == TAINTED_SPLIT and said not in record.splits_read:
        walk.faults.append(
            f"{provenance} has the setting data: {said} but splits_read {record.splits_read}"
        )
