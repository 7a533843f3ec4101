"""The lineage check: which data splits went into an artifact, by files that are verified.

A stage's provenance.json names its inputs and outputs with their SHA-256, the provenance files of
the stages it builds on (its parents), and the splits it read. From one of them the check follows
every ancestor, computes every hash again from the files on disk, and derives the ancestry's splits
anew: it believes nothing that it can compute. The dataset's manifest holds the hashes of its shards
and tokenizer, so these are computed as well.

Each provenance file is hashed by those that build on it. No later one hashes the first that is
visited; the check compares it with its files, its ancestors and its own settings, and the audit's
own provenance.json hashes it from then on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairway.audit.interface import FAIL, NOT_APPLICABLE, PASS, Check
from fairway.errors import UserError
from fairway.files import read_json, sha256_of

TAINTED_SPLIT = "val"
PROVENANCE_NAME = "provenance.json"
MANIFEST_NAME = "manifest.json"


@dataclass
class _Walk:
    """What a walk through the provenance files has seen so far."""

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


def check_lineage(provenance: str | Path | None, used: Iterable[Path] = ()) -> Check:
    """PASS where every file of the ancestry has its listed hash and no stage read `val`.

    provenance: provenance.json of the stage that made the audited product; None where there is
    none. Paths in it are taken as given, relative to the working directory.
    used: files that the audit itself reads; a provenance file must list each.
    evidence: splits (derived), splits_by_stage, files_verified, faults.
    """
    if provenance is None:
        return Check("lineage", NOT_APPLICABLE, "No provenance.json was given.")
    walk = _Walk()
    splits = _visit(Path(provenance), walk)
    for path in used:
        if path.resolve() not in walk.hashes:
            walk.faults.append(
                f"{path} was audited, but nothing in the ancestry of {provenance} lists it"
            )
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
        complaints.append(f"the provenance does not hold: {walk.faults[0]}{more}")
    if complaints:
        sentence = "; ".join(complaints)
        return Check("lineage", FAIL, f"{sentence[0].upper()}{sentence[1:]}.", evidence)
    sentence = (
        f"{len(walk.hashes)} files of {len(walk.stages)} stages have the listed SHA-256, and the "
        f"ancestry read {', '.join(sorted(splits)) or 'no data'} only."
    )
    return Check("lineage", PASS, sentence, evidence)


def _visit(path: Path, walk: _Walk) -> set[str]:
    """Verify one provenance file and its ancestors; return the splits in its ancestry."""
    key = path.resolve()
    if key in walk.splits:
        return walk.splits[key]
    walk.splits[key] = set()  # a file among its own ancestors ends here
    entry = _read_entry(path, walk)
    if entry is None:
        return set()
    read = set(entry["splits_read"])
    walk.stages.setdefault(entry["stage"], []).extend(sorted(read))
    ancestry = set(read)
    ancestors = walk.ancestors[key] = set()
    for parent in map(Path, entry["parents"]):
        ancestry |= _visit(parent, walk)
        ancestors |= {parent.resolve()} | walk.ancestors.get(parent.resolve(), set())
    if set(entry["splits"]) != ancestry:
        walk.faults.append(
            f"{path} says splits {sorted(entry['splits'])}, "
            f"its ancestors add up to {sorted(ancestry)}"
        )
    _verify_files(path, entry, walk)
    _verify_parents(path, entry, walk)
    _verify_settings(path, entry, walk)
    walk.splits[key] = ancestry | set(entry["splits"])
    return walk.splits[key]


def _read_entry(path: Path, walk: _Walk) -> dict[str, Any] | None:
    try:
        entry = read_json(path)
    except UserError as error:
        walk.faults.append(str(error))
        return None
    kinds = {"stage": str, "splits": list, "splits_read": list, "parents": list}
    kinds |= {"inputs": dict, "outputs": dict, "settings": dict}
    if not isinstance(entry, dict):
        entry = {}
    wrong = [key for key, kind in kinds.items() if not isinstance(entry.get(key), kind)]
    if wrong:
        walk.faults.append(f"{path} lacks a proper {', '.join(wrong)}")
        return None
    walk.sha256(path)
    return entry


def _verify_files(provenance: Path, entry: dict[str, Any], walk: _Walk) -> None:
    """Compare the listed hash of every input and output with the file on disk."""
    listed = {Path(name): sha256 for name, sha256 in entry["inputs"].items()}
    listed |= {provenance.parent / name: sha256 for name, sha256 in entry["outputs"].items()}
    for path, sha256 in listed.items():
        _verify_file(path, sha256, provenance, walk)
        if path.name == MANIFEST_NAME and walk.sha256(path) == sha256:
            _verify_manifest(path, walk)


def _verify_file(path: Path, sha256: str, lister: Path, walk: _Walk) -> None:
    found = walk.sha256(path)
    if found is None:
        walk.faults.append(f"{path}, listed in {lister}, is missing")
    elif found != sha256:
        walk.faults.append(f"{path} is not the file listed in {lister}")


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
        _verify_file(path.parent / name, entry["sha256"], path, walk)


def _verify_parents(provenance: Path, entry: dict[str, Any], walk: _Walk) -> None:
    """The stage that made an input must be an ancestor, and each parent's hash must be listed."""
    named = {Path(parent).resolve() for parent in entry["parents"]}
    known = walk.ancestors[provenance.resolve()] | {provenance.resolve()}
    hashed = {Path(name).resolve() for name in entry["inputs"]}
    for name in entry["inputs"]:
        maker = Path(name).parent / PROVENANCE_NAME
        if maker.is_file() and maker.resolve() not in known:
            walk.faults.append(f"{provenance} uses {name}, but {maker} is not in its ancestry")
    for parent in sorted(named - hashed):
        walk.faults.append(f"{provenance} does not list the SHA-256 of its parent {parent}")


def _verify_settings(provenance: Path, entry: dict[str, Any], walk: _Walk) -> None:
    """A stage whose settings say that it reads the validation text must list that split."""
    section = entry["settings"].get(entry["stage"])
    said = section.get("data") if isinstance(section, dict) else None
    if said == TAINTED_SPLIT and said not in entry["splits_read"]:
        walk.faults.append(
            f"{provenance} has the setting data: {said} but splits_read {entry['splits_read']}"
        )
