"""A finished run to be disturbed: scripts are killed, files damaged, and the outcome is judged.

Every script runs in a process forked from one that has imported PyTorch. The run is put back as it
was before each try, at the same place, because provenance.json names paths.
"""

import hashlib
import json
import multiprocessing
import os
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

from fairway.files import sha256_of
from fairway.provenance import PROVENANCE
from fairway.settings import merge
from fairway.stages import STAGES
from runs import Call, calls
from tiny import TINY_CONFIG, synthetic_documents, write_jsonl
from trainings import run_here

LIMIT_SECONDS = 60
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
    """How a script ended."""

    status: int | None
    """Exit status, negative a signal; None where it had to be stopped."""
    output: str
    seconds: float
    operations: list[str]
    """The changes of files that it made, or was about to make when it was killed."""


def run_script(call: Call, root: Path, kill: int | float | None = None) -> Ended:
    """Run a call's script; kill it before its `kill`-th change under `root`, or after seconds."""
    log, started = root.with_suffix(".log"), time.monotonic()
    at_operation = kill if isinstance(kill, int) else None
    process = FORKING.Process(target=_child, args=(call, root, log, at_operation))
    process.start()
    process.join(kill if isinstance(kill, float) else LIMIT_SECONDS)
    hangs = process.is_alive() and not isinstance(kill, float)
    process.kill()
    process.join()
    output = log.read_text(errors="replace")
    seconds = time.monotonic() - started
    operations = log.with_suffix(".operations").read_text().splitlines()
    return Ended(None if hangs else process.exitcode, output, seconds, operations)


def _child(call: Call, root: Path, log: Path, kill_at: int | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # its own would outlive a killed process
    sys.addaudithook(_watcher(root, log.with_suffix(".operations"), kill_at))
    run_here(call.stage.script, *call.arguments)


def _watcher(root: Path, log: Path, kill_at: int | None) -> Callable[[str, tuple], None]:
    """An audit hook that logs each change of a file under `root`, and kills before one of them."""
    changing = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count, sync = 0, os.fsync

    def watched_sync(descriptor: int) -> None:
        sys.audit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in changing or event == "fsync") and str(arguments[0]).startswith(
            str(root)
        ):
            count += 1
            os.write(file, f"{event} {Path(arguments[0]).name}\n".encode())
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = watched_sync
    return watch


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

    def twins(self, path: Path) -> list[Path]:
        """The same file or folder of another seed, another variant or another dataset."""
        names = [("/seed-7/", "/seed-8/"), ("/shared/", "/leaky/"), ("/tiny/", "/other/")]
        pairs = [*names, *((new, old) for old, new in names)]
        found = {Path(f"{path}/".replace(old, new)) for old, new in pairs}
        return sorted(twin for twin in found if twin != path and twin.exists())


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder in `folder`, hidden ones too, with a hash of what time did not make."""
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*"))}


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
    found = {path.name: sha256_of(path) for path in output.rglob("*") if path.is_file()}
    return [name for name, digest in listed.items() if found.get(name) != digest]


def delete_outputs(call: Call) -> None:
    if call.stage.per == "dataset":
        shutil.rmtree(call.output, ignore_errors=True)
    for name in call.stage.files:
        (call.output / name).unlink(missing_ok=True)


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return sorted({name for name, _ in found.items() ^ expected.items()})


# --- damage -------------------------------------------------------------------------------------


def _flip_bit(path: Path, chance: Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path, Random], object]] = {
    "deleted": lambda path, chance: path.unlink(),
    "empty": lambda path, chance: path.write_bytes(b""),
    "cut": lambda path, chance: os.truncate(path, chance.randrange(path.stat().st_size)),
    "bit flipped": _flip_bit,
    "garbage": lambda path, chance: path.write_bytes(chance.randbytes(path.stat().st_size)),
    "other JSON": lambda path, chance: path.write_text(chance.choice(["[]", "{}", "null", "1"])),
    "a folder": lambda path, chance: _replace(path, Path.mkdir),
    "a pipe": lambda path, chance: _replace(path, os.mkfifo),
    "touched": lambda path, chance: os.utime(path, (0, 0)),
}
SWAPPED = "another's"
"""The same file of another seed, variant or dataset is copied over it."""


def files_read(call: Call) -> list[Path]:
    """Every file in the folders that the call's script reads."""
    return sorted(path for folder in call.reads for path in folder.rglob("*") if path.is_file())


def try_damage(run: Run, call: Call, path: Path, damage: str, start: str, chance: Random) -> str:
    """Damage a file that a script reads, and run the script: what came of it."""
    run.restore()
    if start == "nothing":
        shutil.rmtree(call.output)
    if damage == SWAPPED:
        shutil.copyfile(chance.choice(run.twins(path)), path)
    else:
        DAMAGES[damage](path, chance)
    before = contents(run.work)
    return judge(run, call, before, run_script(call, run.work))


def judge(run: Run, call: Call, before: dict[str, str], ended: Ended) -> str:
    """`right result`, `refused` or `FAIL verdict`; else the kind of fault and what shows it."""
    after, own = contents(run.work), run.relative(call.output)
    lines = ended.output.replace("\r", "\n").splitlines()
    if ended.status is None:
        return "hangs"
    if any(line.startswith("Traceback") for line in lines):
        return f"traceback: {lines[-1]}"
    if ended.status == 0:
        made = {name: digest for name, digest in run.contents.items() if name.startswith(own)}
        wrong = differences(after, before | made)
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
        call = _choose_call(run, list(STAGES)[number % len(STAGES)], chance)
        ended = run.ended[call.output]
        kills = [
            chance.uniform(0.0, ended.seconds)
            if chance.random() < 0.3
            else chance.randint(1, len(ended.operations))
            for _ in range(chance.choice([1, 1, 2]))
        ]
        start, deletes = chance.choice(STARTS), chance.random() < 0.5
        what = f"{run.relative(call.output)}, {kills=}, {start=}, {deletes=}"
        yield Try(call.stage.name, what, try_kills(run, call, kills, start, deletes))


def damage_tries(run: Run, seed: int, count: int) -> Iterator[Try]:
    """Each damage in turn, to a random file that the script of a random stage reads."""
    chance, kinds = Random(seed), [*DAMAGES, SWAPPED]
    for number in range(count):
        damage, stage = kinds[number % len(kinds)], chance.choice(list(STAGES)[1:])
        call = _choose_call(run, stage, chance)
        files = [path for path in files_read(call) if damage != SWAPPED or run.twins(path)]
        path = chance.choice(files)
        # A finished training reads nothing.
        start = "nothing" if stage == "train" else chance.choice(["nothing", "finished"])
        what = f"{run.relative(call.output)} reads {run.relative(path)}, {damage}, {start=}"
        yield Try(damage, what, try_damage(run, call, path, damage, start, chance))


def _choose_call(run: Run, stage: str, chance: Random) -> Call:
    return chance.choice([call for call in run.calls if call.stage.name == stage])
