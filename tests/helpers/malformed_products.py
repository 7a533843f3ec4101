"""Damage to every file of a finished run, and what its readers make of it.

Readers are the library's own for the kind of file, the report's, and the audit's check of lineage.
A file is damaged where it lies, for provenance.json names paths, and put back afterwards.
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch

from fairway.audit.bookkeeping import read_evaluation
from fairway.audit.interface import PASS
from fairway.audit.lineage import check_lineage
from fairway.audit.result import AuditRecord
from fairway.errors import UserError
from fairway.files import read_table, read_tensors, write_tensors
from fairway.metrics import read_metrics
from fairway.model.weights import load_model
from fairway.provenance import PROVENANCE, check_product, read_provenance
from fairway.quantization.artifact import CHECKSUM_BYTES, read_artifact
from fairway.records import read_record
from fairway.report.content import page_content
from fairway.report.results import read_results
from fairway.report.settings import ReportSettings
from fairway.report.tables import make_tables, read_run
from fairway.report.token_sums import read_token_sums
from fairway.stages import stages_per

LIMIT_SECONDS = 60
"""A reader that takes longer hangs."""
LONGEST_LINE = 1000
"""Characters of a message to a user."""
WHOLE_RUN = ("the report", "read_run")
"""Readers that read every file of the run, or of its report."""

ODD_TEXTS = [
    b"", b"null", b"[]", b'"text"', b"3", b"{}", b'{"a": 1, "a": 2}', b'{"a": NaN}',
    b'{"a": 1e999}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"stage": "\xff"}',
    b'{"a": "\\ud800"}',
    b"PAR1" + bytes(40) + b"PAR1", (2**63).to_bytes(8, "little") + bytes(40), b"FAIRWAY\0" * 20,
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, -1, 1.5, 10**30, "", "x", "a\nb", "\0", "/dev/zero", "x" * 3000, [], [[]], {},
    {"a": {"a": 1}}, [1, "a", None], [{}],
]  # fmt: skip


def run(run_folder: Path, seed: int, count: int) -> Counter[str]:
    """Damage one file after the other, `count` times in all, and count what comes of it.

    run_folder: of a finished run, such as results/quickstart. The same seed gives the same damage.
    `right`: what was read is what the intact file gives. `refused`: a UserError of one line, or the
    lineage's FAIL. `traceback`: anything else that is raised, an endless or many-lined one too.
    `silent`: another result without a word.
    """
    return Counter(one.outcome for one in tries(run_folder, seed, count))


class Try:
    """One damaged file and one reader."""

    def __init__(self, path: Path, damage: str, reader: str, outcome: str, told: str) -> None:
        self.path, self.damage, self.reader = path, damage, reader
        self.outcome, self.told = outcome, told

    def __repr__(self) -> str:
        return f"{self.outcome}: {self.path}, {self.damage}, read by {self.reader}: {self.told}"


def tries(run_folder: Path, seed: int, count: int) -> Iterator[Try]:
    """As `run`, each try by itself."""
    chance, intact, done = Random(seed), {}, 0
    files = product_files(run_folder)
    while done < count:
        path, damage = chance.choice(files), chance.choice([*DAMAGE])
        name, reader = chance.choice(readers(run_folder, path))
        if name == "Python alone" and damage in WHOLE:
            continue
        key = (name, None if name in WHOLE_RUN else path)
        if key not in intact:
            intact[key] = reader()
        with kept(path):
            if not DAMAGE[damage](path, chance):
                continue
            outcome, told = outcome_of(reader, intact[key])
        done += 1
        yield Try(path, damage, name, outcome, told)


def product_files(run_folder: Path) -> list[Path]:
    """The files that stages have left, except pictures and pages, which nothing reads."""
    kinds = {".json", ".parquet", ".safetensors", ".bin"}
    return sorted(
        path
        for path in run_folder.rglob("*")
        if path.suffix in kinds and (path.parent / PROVENANCE).exists()
    )


def outcome_of(reader: Callable[[], bytes], intact: bytes) -> tuple[str, str]:
    """How reading ended, and what was said."""
    try:
        with time_limit():
            return ("right" if reader() == intact else "silent"), ""
    except UserError as error:
        is_line = "\n" not in str(error) and len(str(error)) <= LONGEST_LINE
        return ("refused" if is_line else "traceback"), str(error)
    except Exception as error:  # whatever it is, it is counted
        return "traceback", repr(error)


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Whatever happens to the file, it is as it was afterwards."""
    content, times = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- readers ------------------------------------------------------------------------------------


def readers(run_folder: Path, path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Who reads the file, by name; each gives bytes that change with what was read."""
    if path.parent.name == "report":
        return [("read_run", lambda: pickled(vars(read_run(run_folder))))]
    found = [
        ("a stage", lambda: taken_up(path)),
        ("the report", lambda: reported(run_folder)),
        ("the lineage", lambda: lineage(run_folder, path)),
    ]
    if path.suffix in (".bin", ".safetensors"):
        found.append(("Python alone", lambda: pickled(READERS[path.name](path))))
    return found


def taken_up(path: Path) -> bytes:
    """What the library's reader gives, after the check that a stage makes of what it takes."""
    if path.name == PROVENANCE:
        check_product(path.with_name("metrics.json"), "its stage")
        return pickled(read_provenance(path, "its stage").model_copy(update={"sha256": None}))
    check_product(path, "its stage")
    return pickled(READERS.get(path.name, lambda path: read_table(path, "its stage"))(path))


def _read_tokens(path: Path) -> Any:
    tokens = pd.read_parquet(path, columns=["token"])["token"].to_numpy()
    metrics = {"val_loss": 1.0, "val_bpb": 1.0}
    text = np.concatenate([[1], tokens])
    found = read_evaluation(path, text, split_bytes=1, metrics=metrics)
    return vars(read_token_sums(path)), found


def _read_weights(path: Path) -> Any:
    model = load_model(path)
    return model.config, dict(model.state_dict())


READERS: dict[str, Callable[[Path], Any]] = {
    "weights.safetensors": _read_weights,
    "averages.safetensors": lambda path: read_tensors(path, "the train stage"),
    "artifact.bin": read_artifact,
    "tokens.parquet": _read_tokens,
    "metrics.json": lambda path: read_metrics(path, path.parent.name, "its stage"),
    "audit.json": lambda path: read_record(AuditRecord, path, "the audit stage"),
}


def reported(run_folder: Path) -> bytes:
    """All that the report says of the run."""
    seeds, folders = layout(run_folder)
    results = read_results(run_folder, folders, seeds)
    tables = make_tables(results, ReportSettings())
    return pickled((page_content(results, tables, ReportSettings()), vars(tables)))


def layout(run_folder: Path) -> tuple[list[int], dict[str, dict[str, str]]]:
    """Seeds, and by variant and stage the folder; a variant is called by its audit's folder."""
    seeds = sorted(int(one.name.removeprefix("seed-")) for one in run_folder.glob("seed-*"))
    first = run_folder / f"seed-{seeds[0]}"
    names = sorted(path.parent.name for path in first.glob("*/audit"))
    stages = [stage.name for stage in stages_per("variant")]
    return seeds, {
        name: {one: name if (first / name / one).is_dir() else "shared" for one in stages}
        for name in names
    }


def lineage(run_folder: Path, path: Path) -> bytes:
    """The verdict on the evaluation that the file belongs to; UserError where it is not PASS.

    Of a run that reads validation text the verdict is FAIL anyway, so its reasons are compared.
    """
    seeds, folders = layout(run_folder)
    (seed,) = (one for one in seeds if f"/seed-{one}/" in str(path))
    stage, folder = path.parent.name, path.parent.parent.name
    users = [name for name, stages in folders.items() if stages[stage] == folder]
    base = run_folder / f"seed-{seed}"
    paths = {stage: base / folder / stage for stage, folder in folders[users[0]].items()}
    used = [paths["gptq"] / "artifact.bin", paths["slot_eval"] / "tokens.parquet"]
    check = check_lineage(paths["slot_eval"] / PROVENANCE, used)
    if check.verdict != PASS and check.evidence["faults"]:
        raise UserError(check.sentence)
    return pickled((check.verdict, check.evidence))


def pickled(value: Any) -> bytes:
    return hashlib.sha256(pickle.dumps(_plain(value))).digest()


def _plain(value: Any) -> Any:
    """Tables and tensors as bytes, so that equal ones are equal."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if isinstance(value, dict):
        return [(key, _plain(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return repr(value)


# --- damage -------------------------------------------------------------------------------------


def _delete(path: Path, chance: Random) -> bool:
    path.unlink()
    return True


def _write(path: Path, data: bytes) -> bool:
    changes = data != path.read_bytes()
    path.write_bytes(data)
    return changes


def _cut(path: Path, chance: Random) -> bool:
    data = path.read_bytes()
    return _write(path, data[: chance.randrange(len(data))])


def _flip(path: Path, chance: Random) -> bool:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return _write(path, bytes(data))


def _overwrite(path: Path, chance: Random) -> bool:
    """Random bytes in the middle."""
    data = path.read_bytes()
    start = chance.randrange(len(data))
    noise = chance.randbytes(chance.randint(1, 64))
    return _write(path, data[:start] + noise + data[start + len(noise) :])


def _instead(path: Path, chance: Random) -> bool:
    """Something else than a file under its name."""
    path.unlink()
    chance.choice(
        [
            Path.mkdir,
            os.mkfifo,
            lambda path: path.symlink_to(path),
            lambda path: path.symlink_to("/dev/zero"),
        ]
    )(path)
    return True


def _odd_value(path: Path, chance: Random) -> bool:
    """JSON in which one value is of another type, or one key is gone; other formats whole."""
    if path.suffix != ".json":
        return _write(path, chance.choice(ODD_TEXTS))
    values = with_odd_value(json.loads(path.read_text()), chance)
    return _write(path, json.dumps(values).encode())


def with_odd_value(values: Any, chance: Random) -> Any:
    """The same JSON, but for one value of another type, or one that is gone."""
    at, key = values, chance.choice([*values])
    while isinstance(at[key], dict | list) and at[key] and chance.random() < 0.6:
        at = at[key]
        key = chance.choice([*at]) if isinstance(at, dict) else chance.randrange(len(at))
    if chance.random() < 0.2:
        del at[key]
    else:
        at[key] = chance.choice(ODD_VALUES)
    return values


def _swap(path: Path, chance: Random) -> bool:
    """The same file of another seed, variant or stage."""
    others = [other for other in path.parents[3].glob(f"*/*/*/{path.name}") if other != path]
    return bool(others) and _write(path, chance.choice(sorted(others)).read_bytes())


def _another(path: Path, chance: Random) -> bool:
    """A whole file of its kind with other numbers, such as another run leaves."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        numbers = table.select_dtypes("number").columns
        name = chance.choice([*numbers])
        table.assign(**{name: table[name] * 2}).to_parquet(path, index=False)
    elif path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path, "its stage")
        name = chance.choice([*tensors])
        other = tensors | {name: tensors[name] * 1.01 + 0.01}
        write_tensors(path, other, metadata)
    elif path.suffix == ".bin":
        body = bytearray(path.read_bytes()[:-CHECKSUM_BYTES])
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        path.write_bytes(body + hashlib.sha256(body).digest())
    else:
        text = path.read_text()
        for old, new in (("FAIL", "PASS"), ("leaky", "causal"), ("0", "1"), ("2", "3")):
            if old in text and chance.random() < 0.5:
                return _write(path, text.replace(old, new).encode())
        return False
    return True


DAMAGE: dict[str, Callable[[Path, Random], bool]] = {
    "deleted": _delete,
    "empty": lambda path, chance: _write(path, b""),
    "cut": _cut,
    "bit flipped": _flip,
    "overwritten": _overwrite,
    "garbage": lambda path, chance: _write(path, chance.randbytes(chance.randrange(1, 5000))),
    "of another shape": lambda path, chance: _write(path, chance.choice(ODD_TEXTS)),
    "with an odd value": _odd_value,
    "no file": _instead,
    "of another seed, variant or stage": _swap,
    "with other numbers": _another,
}
WHOLE = ("of another seed, variant or stage", "with other numbers")
"""Damage that leaves a whole file; that it is the wrong one, only provenance tells."""
