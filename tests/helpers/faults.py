"""A finished run to be disturbed: scripts are killed, files damaged, and the outcome is judged.

Every script runs in a process forked from one that has imported PyTorch. The run is put back as it
was before each try, at the same place, because provenance.json names paths.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import RLock

import pandas as pd
import torch
from tqdm import tqdm

from fairway.data.verified import RECORD
from fairway.files import sha256_of
from fairway.provenance import PROVENANCE
from fairway.settings import merge
from fairway.stages import STAGES, stages_of_a_run
from runs import Call, calls
from tiny import TINY_CONFIG, synthetic_documents, write_jsonl
from trainings import run_here

LIMIT_SECONDS = 60
NAMES = [stage.name for stage in stages_of_a_run()]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "fsync")
WRITING = os.O_WRONLY | os.O_RDWR
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["fairway.audit.runner", "fairway.data.build", "fairway.data.corpora.jsonl",
     "fairway.evaluation.adapters.slot", "fairway.evaluation.evaluator",
     "fairway.evaluation.plain", "fairway.quantization.quantize",
     "fairway.quantization.quantizers.gptq", "fairway.report.page", "fairway.stage",
     "fairway.training.selection", "fairway.training.trainer", "fairway.training.ttt",
     "scipy.stats", "torch._dynamo"]
)  # fmt: skip


# --- scripts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a script ended. status: None where it had to be stopped. changes: of files, by it."""

    status: int | None
    output: str
    seconds: float
    changes: int


def run_script(call: Call, root: Path, kill: int | float | None = None) -> Ended:
    """Run a call's script; kill it before its `kill`-th change under `root`, or after seconds."""
    log, counter = root.with_suffix(".log"), root.with_suffix(".changes")
    patience = kill if isinstance(kill, float) else LIMIT_SECONDS
    process = FORKING.Process(target=_child, args=(call, root, log, counter, kill))
    started = time.monotonic()
    process.start()
    process.join(patience)
    hangs = process.is_alive() and patience != kill
    process.kill()
    process.join()
    seconds, changes = time.monotonic() - started, counter.stat().st_size
    status = None if hangs else process.exitcode
    return Ended(status, log.read_text(errors="replace"), seconds, changes)


def _child(call: Call, root: Path, log: Path, counter: Path, kill: int | float | None) -> None:
    output, count = (os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for path in (log, counter))
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # its own would outlive a killed process
    sync = os.fsync

    def audited_sync(descriptor: int) -> None:
        sys.audit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def count_changes(event: str, arguments: tuple) -> None:
        is_change = event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITING)
        if is_change and str(arguments[0]).startswith(str(root)):
            os.write(count, b".")
            if os.fstat(count).st_size == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = audited_sync
    sys.addaudithook(count_changes)
    run_here(call.stage.script, *call.arguments)


# --- a run --------------------------------------------------------------------------------------

DATASETS = ("tiny", "other")
CONFIG = merge(
    TINY_CONFIG,
    {
        "variants": {"causal": {}, "leaky": {"ttt": {"data": "val"}}},
        "data": {"val_docs": 2, "shard_tokens": 1024},
        "train": {"checkpoint_seconds": 0.001},
        "evaluation": {"adapters": [{"slot": {"iterations": 2}}]},
        "audit": {"flips": 2, "stream_tokens": 64, "null_tokens": 64},
    },
)


class Run:
    """A finished run of two variants, and a second dataset, in `folder`/work."""

    def __init__(self, folder: Path, seeds: Sequence[int] = (7, 8)) -> None:
        self.work, self.kept = folder / "work", folder / "kept"
        self.work.mkdir(parents=True)
        datasets = {name: self.work / "results/data" / name for name in DATASETS}
        configs = [self._write_config(name, seeds, words) for words, name in enumerate(DATASETS)]
        self.calls = [
            Call(STAGES["tokenize"], ("--config", str(config), "--threads", "1"), (), dataset)
            for config, dataset in zip(configs, datasets.values(), strict=True)
        ]
        self.calls += calls(configs[0], datasets["tiny"], self.work / "results/tiny")
        self.ended = {call.output: run_script(call, self.work) for call in self.calls}
        for ended in self.ended.values():
            assert ended.status == 0, ended.output
        shutil.copytree(self.work, self.kept)
        self.contents = contents(self.work)

    def _write_config(self, dataset: str, seeds: Sequence[int], words: int) -> Path:
        documents = synthetic_documents(40 + 20 * words, seed=words)
        text = write_jsonl(self.work / f"{dataset}.jsonl", documents)
        config = merge(CONFIG, {"data": {"name": dataset, "paths": [str(text)]}})
        path = self.work / f"{dataset}.yaml"
        path.write_text(json.dumps(config | {"seeds": list(seeds)}))
        return path

    def restore(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.kept, self.work)

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.work))

    def twins(self, path: Path, variants: bool = True) -> list[Path]:
        """The same file or folder of another seed, of another dataset or of another variant."""
        names = [("/seed-7/", "/seed-8/"), ("/tiny/", "/other/")]
        names += [("/shared/", "/leaky/")] if variants else []
        pairs = [*names, *((new, old) for old, new in names)]
        found = {Path(f"{path}/".replace(old, new)) for old, new in pairs}
        return sorted(twin for twin in found if twin != path and twin.exists())


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder in `folder`, hidden ones too, with a hash of what time did not make.

    But for the record of hashed shards, which is no product and has their inodes.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.name != RECORD]
    return {str(path.relative_to(folder)): _digest(path) for path in paths}


def _digest(path: Path) -> str:
    if not path.is_file():
        return "a folder" if path.is_dir() else "no file"
    try:
        text = _without_times(path)
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged
        text = path.read_bytes()
    return hashlib.sha256(text).hexdigest()


def _without_times(path: Path) -> bytes:
    """Seconds, memory and the checkout's commit left out, and hashes of files that hold them."""
    if path.name == "metrics.parquet":
        return pd.read_parquet(path).drop(columns="seconds").to_json().encode()
    if path.name not in ("metrics.json", PROVENANCE):
        return path.read_bytes()
    values = json.loads(path.read_text())
    if path.name == PROVENANCE:
        for files in (values["inputs"], values["outputs"]):
            timed = [name for name in files if Path(name).stem in ("metrics", "provenance")]
            files |= dict.fromkeys(timed)
        values |= {"git_commit": None, "sha256": None}
    else:
        timed = [name for name in values if "second" in name or name == "peak_memory_bytes"]
        values |= dict.fromkeys(timed)
    return json.dumps(values).encode()


# --- kills --------------------------------------------------------------------------------------

STARTS = ("nothing", "finished", "another's")
"""What lies in the output's folder when the script that will be killed starts."""


def try_kills(run: Run, call: Call, kills: list[int | float], start: str, deletes: bool) -> str:
    """Kill a script once or more, then let it finish: `same bytes`, or what is wrong.

    deletes: whether the outputs of a killed script are deleted, as Snakemake does.
    """
    run.restore()
    if start != "finished":
        shutil.rmtree(call.output)
    if start == "another's" and (twins := run.twins(call.output)):
        shutil.copytree(twins[0], call.output)
    for kill in kills:
        run_script(call, run.work, kill)
        if stale := stale_files(call.output):
            return f"old provenance: {stale}"
        if deletes:
            delete_outputs(call)
    ended = run_script(call, run.work)
    if ended.status != 0:
        return f"no second start: status {ended.status}, {ended.output[-1000:]}"
    wrong = differences(contents(run.work), run.contents)
    return f"other files: {wrong}" if wrong else "same bytes"


def stale_files(output: Path) -> list[str]:
    """The files that are not as the provenance.json beside them says."""
    if not (output / PROVENANCE).exists():
        return []
    listed = json.loads((output / PROVENANCE).read_text())["outputs"]
    found = {name: output / name for name in listed}
    return [
        name
        for name, path in found.items()
        if not path.is_file() or sha256_of(path) != listed[name]
    ]


def delete_outputs(call: Call) -> None:
    if call.stage.per == "dataset":
        shutil.rmtree(call.output, ignore_errors=True)
    for name in call.stage.files:
        (call.output / name).unlink(missing_ok=True)


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return sorted({name for name, _ in found.items() ^ expected.items()})


def lasting(found: Mapping[str, str]) -> dict[str, str]:
    """What is not a lock or a temporary file, which may come and go."""
    hidden = re.compile(r"/\..*\.(lock|partial)\b")
    return {name: digest for name, digest in found.items() if not hidden.search(name)}


# --- damage -------------------------------------------------------------------------------------


def _flip_bit(path: Path, chance: Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _copy(path: Path, twin: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(twin, path)
    else:
        shutil.copyfile(twin, path)


DAMAGES: dict[str, Callable[[Path, Random], object]] = {
    "deleted": lambda path, chance: path.unlink(),
    "empty": lambda path, chance: path.write_bytes(b""),
    "cut": lambda path, chance: os.truncate(path, chance.randrange(path.stat().st_size)),
    "one bit flipped": _flip_bit,
    "garbage": lambda path, chance: path.write_bytes(chance.randbytes(path.stat().st_size)),
    "other JSON": lambda path, chance: path.write_text(chance.choice(["[]", "{}", "null", "1"])),
    "a folder in its place": lambda path, chance: _replace(path, Path.mkdir),
    "a pipe in its place": lambda path, chance: _replace(path, os.mkfifo),
    "touched": lambda path, chance: os.utime(path, (0, 0)),
}
SWAPPED, SWAPPED_FOLDER = "that of another run", "its folder that of another seed or dataset"


def try_damage(run: Run, call: Call, damage: str, start: str, chance: Random) -> tuple[str, str]:
    """Damage one of the files that a script reads, and run the script: which, and the outcome."""
    run.restore()
    if start != "finished":
        shutil.rmtree(call.output)
    if start == "interrupted":
        run_script(call, run.work, chance.randrange(1, run.ended[call.output].changes))
    # Beside the stages that it takes products from, train reads its checkpoints.
    folders = [*call.reads, call.output.parent / ".checkpoints"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    if damage == SWAPPED:
        path = chance.choice([path for path in files if run.twins(path)])
        _copy(path, chance.choice(run.twins(path)))
    elif damage == SWAPPED_FOLDER:
        path = chance.choice([path for path in call.reads if run.twins(path, variants=False)])
        _copy(path, chance.choice(run.twins(path, variants=False)))
    else:
        path = chance.choice(files)
        DAMAGES[damage](path, chance)
    before = lasting(contents(run.work))
    outcome = judge(run, call, before, run_script(call, run.work))
    return run.relative(path), outcome


def judge(run: Run, call: Call, before: dict[str, str], ended: Ended) -> str:
    """`right result`, `refused` or `FAIL verdict`; else the kind of fault and what shows it."""
    after, own = lasting(contents(run.work)), run.relative(call.output)
    lines = ended.output.replace("\r", "\n").splitlines()
    if ended.status is None:
        return "hangs"
    if any(line.startswith("Traceback") for line in lines):
        return f"traceback: {lines[-1]}"
    if ended.status == 0:
        places = (own, f"{Path(own).parent}/.checkpoints")
        made = {name: value for name, value in run.contents.items() if name.startswith(places)}
        kept = {name: value for name, value in before.items() if not name.startswith(places)}
        wrong = differences(after, kept | made)
        verdict = call.output / "audit.json"
        if wrong and verdict.exists() and json.loads(verdict.read_text())["verdict"] == "FAIL":
            return "FAIL verdict"
        return f"silent: {wrong}" if wrong else "right result"
    if wrong := differences(after, before):
        return f"lost: {wrong}"
    told = [line for line in lines if line.startswith("error: ")]
    clear = ended.status == 1 and len(told) == 1 and lines[-1] == told[0]
    return "refused" if clear else f"unclear: status {ended.status}, {lines[-3:]}"


# --- many tries ---------------------------------------------------------------------------------

GOOD = ("same bytes", "right result", "refused", "FAIL verdict")
"""The outcomes that are promised."""


@dataclass(frozen=True)
class Try:
    """One disturbance. kind: of which sort it is. what: enough to do it again."""

    kind: str
    what: str
    outcome: str

    @property
    def is_fault(self) -> bool:
        return self.outcome not in GOOD


def kill_tries(run: Run, seed: int, count: int) -> Iterator[Try]:
    """Kills at random times and random changes of files, of each stage's script in turn."""
    chance = Random(seed)
    for number in range(count):
        call = _choose_call(run, NAMES[number % len(NAMES)], chance)
        ended = run.ended[call.output]
        kills = [
            chance.uniform(0.0, ended.seconds)
            if chance.random() < 0.3
            else chance.randint(1, ended.changes)
            for _ in range(chance.choice([1, 1, 2]))
        ]
        start, deletes = chance.choice(STARTS), chance.random() < 0.5
        what = f"{run.relative(call.output)}, {kills=}, {start=}, {deletes=}"
        yield Try(call.stage.name, what, try_kills(run, call, kills, start, deletes))


def damage_tries(run: Run, seed: int, count: int) -> Iterator[Try]:
    """Each damage in turn, to a random file that the script of a random stage reads."""
    chance, kinds = Random(seed), [*DAMAGES, SWAPPED, SWAPPED_FOLDER]
    for number in range(count):
        damage = kinds[number % len(kinds)]
        # Another dataset, whole, is as good to train on.
        stage = chance.choice(NAMES[2 if damage == SWAPPED_FOLDER else 1 :])
        call = _choose_call(run, stage, chance)
        # A finished training reads nothing.
        start = chance.choice(["nothing", "interrupted" if stage == "train" else "finished"])
        path, outcome = try_damage(run, call, damage, start, chance)
        yield Try(damage, f"{run.relative(call.output)} reads {path}, {damage}, {start=}", outcome)


def _choose_call(run: Run, stage: str, chance: Random) -> Call:
    return chance.choice([call for call in run.calls if call.stage.name == stage])
