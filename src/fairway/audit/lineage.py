"""The lineage check: which data splits went into an artifact, by records that are verified.

A stage's provenance.json names its inputs and outputs with their SHA-256, the provenance files of
the stages it builds on (its parents), and the splits it read. Starting from one of them, every
ancestor's record is read, every hash is computed again from the files on disk, and the ancestry's
splits are derived anew: nothing that a record says is believed where it can be computed. The
dataset's manifest holds the hashes of its shards and tokenizer, so these are computed as well.

Each record is hashed by the ones that build on it; the first one visited is hashed by nobody yet.
It is held against the metrics and products it names and against its own settings, and from then on
by the audit's own record, which hashes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairway.audit.interface import FAIL, NOT_RUN, PASS, Check
from fairway.errors import UserError
from fairway.files import read_json, sha256_of

TAINTED_SPLIT = "val"
RECORD_NAME = "provenance.json"
MANIFEST_NAME = "manifest.json"


@dataclass
class _Walk:
    """What a walk through the records has seen so far."""

    hashes: dict[Path, str] = field(default_factory=dict)
    splits: dict[Path, set[str]] = field(default_factory=dict)
    ancestors: dict[Path, set[Path]] = field(default_factory=dict)
    stages: dict[str, list[str]] = field(default_factory=dict)
    manifests: set[Path] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def sha256(self, path: Path) -> str | None:
        """The file's hash, computed once; None where there is no such file."""
        key = path.resolve()
        if key not in self.hashes and path.is_file():
            self.hashes[key] = sha256_of(path)
        return self.hashes.get(key)


def check_lineage(record_path: str | Path | None, used: Iterable[Path] = ()) -> Check:
    """PASS where every record and file in the ancestry is as recorded and no stage read `val`.

    record_path: provenance.json of the stage that made the audited product. Paths inside records
    are taken as given, relative to the working directory. used: files that the audit itself reads,
    which must be among those recorded.
    evidence: splits (derived), splits_by_stage, files_verified, faults.
    """
    if record_path is None:
        return Check("lineage", NOT_RUN, "No provenance record was given.")
    walk = _Walk()
    splits = _visit(Path(record_path), walk)
    for path in used:
        if path.resolve() not in walk.hashes:
            walk.faults.append(f"{path} was audited, but no record of {record_path} names it")
    evidence = {
        "splits": sorted(splits),
        "splits_by_stage": dict(sorted(walk.stages.items())),
        "files_verified": len(walk.hashes),
        "faults": walk.faults,
    }
    complaints = []
    if TAINTED_SPLIT in splits:
        readers = [stage for stage, read in walk.stages.items() if TAINTED_SPLIT in read]
        by = f" (read by {', '.join(sorted(readers))})" if readers else ""
        complaints.append(f"the validation text is in the artifact's ancestry{by}")
    if walk.faults:
        more = f" and {len(walk.faults) - 1} more" if len(walk.faults) > 1 else ""
        complaints.append(f"the records do not hold: {walk.faults[0]}{more}")
    if complaints:
        sentence = "; ".join(complaints)
        return Check("lineage", FAIL, f"{sentence[0].upper()}{sentence[1:]}.", evidence)
    sentence = (
        f"{len(walk.hashes)} files of {len(walk.stages)} stages have the recorded SHA-256, and the "
        f"ancestry read {', '.join(sorted(splits)) or 'no data'} only."
    )
    return Check("lineage", PASS, sentence, evidence)


def _visit(record_path: Path, walk: _Walk) -> set[str]:
    """Verify one record and its ancestors; return the splits in its ancestry."""
    key = record_path.resolve()
    if key in walk.splits:
        return walk.splits[key]
    walk.splits[key] = set()  # a record among its own ancestors ends here
    record = _read_record(record_path, walk)
    if record is None:
        return set()
    read = set(record["splits_read"])
    walk.stages.setdefault(record["stage"], []).extend(sorted(read))
    ancestry = set(read)
    ancestors = walk.ancestors[key] = set()
    for parent in map(Path, record["parents"]):
        ancestry |= _visit(parent, walk)
        ancestors |= {parent.resolve()} | walk.ancestors.get(parent.resolve(), set())
    if set(record["splits"]) != ancestry:
        walk.faults.append(
            f"{record_path} says splits {sorted(record['splits'])}, "
            f"its ancestors add up to {sorted(ancestry)}"
        )
    _verify_files(record_path, record, walk)
    _verify_parents(record_path, record, walk)
    _verify_settings(record_path, record, walk)
    walk.splits[key] = ancestry | set(record["splits"])
    return walk.splits[key]


def _read_record(path: Path, walk: _Walk) -> dict[str, Any] | None:
    try:
        record = read_json(path)
    except UserError as error:
        walk.faults.append(str(error))
        return None
    kinds = {"stage": str, "splits": list, "splits_read": list, "parents": list}
    kinds |= {"inputs": dict, "outputs": dict, "settings": dict}
    if not isinstance(record, dict):
        record = {}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if wrong:
        walk.faults.append(f"{path} lacks a proper {', '.join(wrong)}")
        return None
    walk.sha256(path)
    return record


def _verify_files(record_path: Path, record: dict[str, Any], walk: _Walk) -> None:
    """Compare the recorded hash of every input and output with the file on disk."""
    recorded = {Path(name): sha256 for name, sha256 in record["inputs"].items()}
    recorded |= {record_path.parent / name: sha256 for name, sha256 in record["outputs"].items()}
    for path, sha256 in recorded.items():
        found = walk.sha256(path)
        if found is None:
            walk.faults.append(f"{path}, recorded in {record_path}, is missing")
        elif found != sha256:
            walk.faults.append(f"{path} is not the file recorded in {record_path}")
        elif path.name == MANIFEST_NAME:
            _verify_manifest(path, walk)


def _verify_manifest(path: Path, walk: _Walk) -> None:
    """Compare the shards and the tokenizer on disk with the hashes in the dataset's manifest."""
    key = path.resolve()
    if key in walk.manifests:
        return
    walk.manifests.add(key)
    manifest = read_json(path)
    named = dict(manifest["shards"])
    named[manifest["tokenizer"]["path"]] = manifest["tokenizer"]
    for name, entry in named.items():
        found = walk.sha256(path.parent / name)
        if found is None:
            walk.faults.append(f"{path.parent / name}, listed in {path}, is missing")
        elif found != entry["sha256"]:
            walk.faults.append(f"{path.parent / name} is not the file listed in {path}")


def _verify_parents(record_path: Path, record: dict[str, Any], walk: _Walk) -> None:
    """The stage that made an input must be an ancestor, and every parent's record be hashed."""
    named = {Path(parent).resolve() for parent in record["parents"]}
    known = walk.ancestors[record_path.resolve()] | {record_path.resolve()}
    hashed = {Path(name).resolve() for name in record["inputs"]}
    for name in record["inputs"]:
        maker = Path(name).parent / RECORD_NAME
        if maker.is_file() and maker.resolve() not in known:
            walk.faults.append(f"{record_path} uses {name}, but {maker} is not in its ancestry")
    for parent in sorted(named - hashed):
        walk.faults.append(f"{record_path} does not record the SHA-256 of its parent {parent}")


def _verify_settings(record_path: Path, record: dict[str, Any], walk: _Walk) -> None:
    """A stage whose settings say that it reads the validation text must record that it did."""
    section = record["settings"].get(record["stage"])
    said = section.get("data") if isinstance(section, dict) else None
    if said == TAINTED_SPLIT and said not in record["splits_read"]:
        walk.faults.append(
            f"{record_path} has the setting data: {said} but splits_read {record['splits_read']}"
        )
