"""Which files of finished stages are missing, unfinished or changed: `fairway check`."""

import argparse
import shlex
from pathlib import Path

from fairway.data.manifest_fields import read_manifest
from fairway.errors import UserError
from fairway.files import sha256_of
from fairway.provenance import PROVENANCE, Provenance, read_provenance
from fairway.stages import STAGES

MISSING = "is missing"


def check(folder: Path) -> dict[Path, str]:
    """Hold the stages under `folder`, and those that they build on, against their provenance.json.

    Returns what is wrong, by the file or folder. The current folder must be the run's.
    Raises UserError where there is no stage.
    """
    faults: dict[Path, str] = {}
    records: dict[Path, Provenance] = {}
    waiting = _stage_folders(folder)
    if not waiting:
        raise UserError(
            f"{folder} holds no stage's files: name a run's, such as results/quickstart"
        )
    for stage_folder in waiting:
        try:
            record = read_provenance(stage_folder / PROVENANCE, _maker(stage_folder))
        except UserError as error:
            faults[stage_folder / PROVENANCE] = str(error)
            continue
        records[stage_folder] = record
        faults |= _product_faults(stage_folder, record)
        parents = (Path(parent).parent for parent in record.parents)
        waiting += [parent for parent in parents if parent not in waiting]
    for stage_folder, record in records.items():
        if record.stage == "report" and stage_folder.name != "report":
            continue  # an older one, kept: what it was made from may be another by now
        # After the products, for a product's own fault is none of the stages that took it.
        faults |= _input_faults(stage_folder, record, faults)
    return faults


def _stage_folders(folder: Path) -> list[Path]:
    """Those with a provenance.json, and those that should have one."""
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    return [
        path
        for path in folders
        if (path.name in STAGES or (path / PROVENANCE).exists())
        and not any(part.startswith(".") for part in path.parts)  # checkpoints
    ]


def _product_faults(folder: Path, record: Provenance) -> dict[Path, str]:
    faults = {folder / name: _fault(folder / name, record.outputs[name]) for name in record.outputs}
    manifest = folder / "manifest.json"
    if not faults.get(manifest, "no dataset"):
        shards = read_manifest(manifest).shards
        faults |= {folder / name: _fault(folder / name, shards[name].sha256) for name in shards}
    return {
        path: f"{path} {fault}; run {_maker(folder)}" for path, fault in faults.items() if fault
    }


def _input_faults(folder: Path, record: Provenance, known: dict[Path, str]) -> dict[Path, str]:
    faults = {}
    for name, digest in record.inputs.items():
        path = Path(name)
        fault = None if path in known else _fault(path, digest)
        if fault:
            is_lost = fault == MISSING and path.parent.name in STAGES
            at_fault = path.parent if is_lost else folder
            told = f"{path} {fault}, and {folder} was made from it; run {_maker(at_fault)}"
            faults[at_fault / PROVENANCE] = told
    return faults


def _fault(path: Path, digest: str) -> str | None:
    """What is wrong with a file that had this SHA-256."""
    if not path.is_file():
        return MISSING
    try:
        return None if sha256_of(path) == digest else "has changed"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _maker(folder: Path) -> str:
    """The command that makes a stage's products again, but not what follows, which may not change.

    In a dataset's folder files are no targets.
    """
    target = folder / PROVENANCE if folder.name in STAGES else folder
    return f"`snakemake --cores 2 --force {shlex.quote(str(target))}`"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fairway check`."""
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("results"), help="of a run, or of several"
    )


def run(parsed: argparse.Namespace) -> int:
    """`fairway check`: exit status 1 where a file is at fault."""
    faults = check(parsed.folder)
    if not faults:
        print(f"{parsed.folder}: every file is as it was made")
        return 0
    print(*faults.values(), sep="\n")
    print(f"faults: {len(faults)}; add your run's --configfile and --config to these commands")
    return 1
