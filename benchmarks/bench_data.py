"""Data of the real size: how stages start on it, and what grows with the validation text.

    python benchmarks/bench_data.py --gigabytes 10
    python benchmarks/bench_data.py --validation-tokens 62000000 [--device cuda]
    python benchmarks/bench_data.py --validation-tokens 16000000 --processes 4

The first makes synthetic shards and loads them in each stage's way, before and after their hashes
are known. The second works through a synthetic validation text and through smaller ones, which
shows what is linear: windows, the n-gram adapter's index, the table of scored targets, and what
report and audit make of it. The third shares the scoring among processes. No model computes: each
logit is 0. Every row is measured in a process of its own, which ends with it.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairway.audit.bookkeeping import read_evaluation
from fairway.audit.flip_plan import choose_excerpt, plan_flips
from fairway.audit.lineage import check_lineage
from fairway.data.build import make_dataset
from fairway.data.dataset import Span, load_dataset, read_split
from fairway.data.loader import CoprimeLoader
from fairway.data.overlap import find_overlap
from fairway.data.settings import DataSettings
from fairway.data.shards import read_shard, write_shard
from fairway.data.token_bytes import ByteCounts
from fairway.data.tokenizer import train_tokenizer
from fairway.data.verified import RECORD
from fairway.distributed import distributed_world
from fairway.evaluation.adapters.ngram import NgramSettings, build_caches
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.text import cut_text
from fairway.evaluation.token_table import gather_scores, table_metrics, token_table
from fairway.evaluation.windows import lane_groups, lane_steps
from fairway.files import sha256_of, write_table
from fairway.provenance import write_provenance
from fairway.quantization.calibration import training_tokens
from fairway.report.token_sums import read_token_sums

MIB = 2**20
BOS = 1
VOCABULARY = 1024
SCORED_VOCABULARY = 64
"""Of the text that is scored: what a softmax costs is no matter of the data."""
SHARD_TOKENS = 100_000_000
VALIDATION_TOKENS = 62_000_000
DOCUMENT_TOKENS = 1240
"""As FineWeb's 50,000 documents have on average."""
TABLE = "tokens.parquet"
TEXTS = VALIDATION, TRAINING = "val_000000.bin", "train_000000.bin"


# --- synthetic text -----------------------------------------------------------------------------


def synthetic_tokens(count: int, vocabulary: int) -> np.ndarray:
    """uint16 [count] in which some tokens are far more frequent than others, in documents."""
    generator = np.random.default_rng(0)
    words = generator.random(count, np.float32)
    words *= words
    words *= vocabulary - BOS - 1
    tokens = words.astype(np.uint16) + np.uint16(BOS + 1)
    tokens[generator.random(count, np.float32) < 1 / DOCUMENT_TOKENS] = BOS
    tokens[0] = BOS
    return tokens


def write_scored_text(folder: Path, count: int) -> None:
    """A text to be scored, and the same backwards to look for it in."""
    tokens = synthetic_tokens(count, SCORED_VOCABULARY)
    write_shard(folder / VALIDATION, tokens)
    write_shard(folder / TRAINING, tokens[::-1])


def write_synthetic_shards(folder: Path, gigabytes: float) -> None:
    total = int(gigabytes * 1e9) // 2
    size = min(SHARD_TOKENS, max(1, total // 4))
    tokens = synthetic_tokens(size, VOCABULARY)
    folder.mkdir()
    for number in range(total // size):
        write_shard(folder / f"train_{number:06d}.bin", np.roll(tokens, number * 12_345))
    write_shard(folder / VALIDATION, tokens[: min(VALIDATION_TOKENS, size)])
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnop"))
    words = ["".join(generator.choice(letters, 6)) for _ in range(4000)]
    model = train_tokenizer([" ".join(words)] * 2, VOCABULARY, seed=0)
    (folder / "tokenizer.model").write_bytes(model)


# --- how each stage loads its data --------------------------------------------------------------


def tokenize(folder: Path) -> None:
    settings = DataSettings(
        name="synthetic",
        source="shards",
        folder=str(folder / "shards"),
        tokenizer=str(folder / "shards/tokenizer.model"),
        vocab_size=VOCABULARY,
        check_overlap=False,
    )
    made = folder / "dataset"
    _, inputs = make_dataset(settings, made, threads=torch.get_num_threads())
    write_provenance(
        made,
        stage="tokenize",
        settings={},
        inputs={path: sha256_of(path) for path in inputs},
        outputs=[made / "manifest.json", made / "tokenizer.model"],
        splits_read=["train"],
    )


def start_train(manifest: Path) -> None:
    spans = load_dataset(manifest).splits["train"]
    CoprimeLoader(spans, sequence_length=2048, batch_sequences=384, seed=0).next_batch()


def start_ema(manifest: Path) -> None:
    dataset = load_dataset(manifest, ("selection", "val"))
    read_split(dataset, "selection"), read_split(dataset, "val")


def start_ttt(manifest: Path) -> None:
    dataset = load_dataset(manifest, ("adaptation", "val"))
    read_split(dataset, "adaptation"), read_split(dataset, "val")


def start_gptq(manifest: Path) -> None:
    training_tokens(load_dataset(manifest), sequences=64, tokens=2048, seed=0)


def start_slot_eval(manifest: Path) -> None:
    int64_text(read_split(load_dataset(manifest, ("val",)), "val"), "cpu")


def start_audit(manifest: Path) -> None:
    """Without the hashes at first, then of all files, which `lineage` takes on no one's word."""
    int64_text(read_split(load_dataset(manifest, ("val",), check_hashes=False), "val"), "cpu")
    assert not check_lineage(manifest.with_name("provenance.json")).evidence["faults"]


STARTS: dict[str, Callable[[Path], None]] = {
    "train": start_train,
    "ema": start_ema,
    "ttt": start_ttt,
    "gptq": start_gptq,
    "slot_eval": start_slot_eval,
    "audit": start_audit,
}


# --- what grows with the validation text --------------------------------------------------------


class NoModel(torch.nn.Module):
    """Every logit is 0."""

    kernels = "plain"
    adapter = None

    def __init__(self, device: str) -> None:
        super().__init__()
        self.logits = torch.zeros((), device=device)

    def __call__(self, tokens: Tensor, first_position: int) -> Tensor:
        rows, length = tokens.shape
        return self.logits.expand(rows, length - first_position, SCORED_VOCABULARY)


EVALUATION = EvaluationSettings(adapters=())
COUNTS = ByteCounts(
    base=np.ones(SCORED_VOCABULARY, np.int16),
    leading_space=np.zeros(SCORED_VOCABULARY, np.bool_),
    boundary=np.zeros(SCORED_VOCABULARY, np.bool_),
)


def int64_text(tokens: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def windows(folder: Path, device: str) -> None:
    text = cut_text(int64_text(read_shard(folder / VALIDATION), device), EVALUATION, BOS)
    for group in lane_groups(range(len(text.windows)), EVALUATION):
        lane_steps([run for _, run in group], EVALUATION.forward_windows)


def ngram_index(folder: Path, device: str) -> None:
    text = cut_text(int64_text(read_shard(folder / VALIDATION), device), EVALUATION, BOS)
    build_caches(text, NgramSettings())


def scores_and_table(folder: Path, device: str) -> None:
    with distributed_world(device) as world:
        tokens = read_shard(folder / VALIDATION)
        evaluator = Evaluator(NoModel(device), EVALUATION, bos_id=BOS)
        own = evaluator.score_rank(int64_text(tokens, device), world.rank, world.size)
        parts = gather_scores(world, own)
        if world.is_main:
            table = token_table(parts, tokens, COUNTS, BOS)
            write_table(folder / TABLE, table)
            table_metrics(table)


def report_sums(folder: Path, device: str) -> None:
    read_token_sums(folder / TABLE)


def audit_table(folder: Path, device: str) -> None:
    """The table's hash, bookkeeping, and where the flips go."""
    tokens = read_shard(folder / VALIDATION).astype(np.int64)
    sha256_of(folder / TABLE)
    found = read_evaluation(folder / TABLE, tokens, split_bytes=None, metrics={})
    assert found.errors.missing == 0
    excerpt = choose_excerpt(torch.from_numpy(tokens), 8192, BOS)
    plan_flips(excerpt, vocab_size=SCORED_VOCABULARY, bos_id=BOS, num_flips=64, seed=0)


def overlap(folder: Path, device: str) -> None:
    """With a training text of the same length that has nothing in common with it."""
    val, train = (Span(folder / name, 0, len(read_shard(folder / name))) for name in TEXTS)
    with ThreadPoolExecutor(1) as pool:
        find_overlap([val], [train], BOS, pool)


WORK: dict[str, Callable[[Path, str], None]] = {
    "windows": windows,
    "n-gram index": ngram_index,
    "scores and table": scores_and_table,
    "report's sums": report_sums,
    "audit of the table": audit_table,
    "overlap": overlap,
}


# --- measuring ----------------------------------------------------------------------------------


def memory(name: str, of: str = "status") -> int:
    """Bytes of this process, as /proc/self/`of` gives them."""
    for line in Path("/proc/self", of).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def watched_share(found: dict[str, float], every_seconds: float = 0.2) -> Iterator[None]:
    """Note the largest proportional set: pages that processes share count by parts."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_seconds):
            found["share"] = max(found["share"], memory("Pss", "smaps_rollup"))

    found["share"] = memory("Pss", "smaps_rollup")
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measured(work: Callable[[], None], device: str) -> dict[str, float]:
    """seconds, core_seconds, and bytes at most: peak (of this process beyond its start), share
    (proportional), gpu."""
    found: dict[str, float] = {}
    before, began = memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    with watched_share(found):
        started = time.perf_counter()
        work()
        found["seconds"] = time.perf_counter() - started
    ended = resource.getrusage(resource.RUSAGE_SELF)
    spent = (ended.ru_utime - began.ru_utime, ended.ru_stime - began.ru_stime)
    found |= {"core_seconds": sum(spent), "peak": memory("VmHWM") - before, "gpu": 0}
    if device == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


def in_own_process(arguments: Iterable[str], processes: int = 1) -> list[dict[str, float]]:
    """What `--measure` finds, in each process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def row(*cells: object) -> None:
    print(f"{cells[0]!s:<32}", *(f"{cell!s:>14}" for cell in cells[1:]), flush=True)


def mib(size: float) -> str:
    return f"{size / MIB:,.0f}"


def show_starts(folder: Path, gigabytes: float) -> None:
    write_synthetic_shards(folder / "shards", gigabytes)
    row(f"{gigabytes:g} GB of shards", "seconds", "core-seconds", "peak MiB")
    manifest = folder / "dataset/manifest.json"

    def show(name: str, when: str) -> None:
        (found,) = in_own_process(["--measure", name, "--folder", str(folder)])
        row(
            f"{name}, {when}",
            f"{found['seconds']:.2f}",
            f"{found['core_seconds']:.2f}",
            mib(found["peak"]),
        )

    show("tokenize", "finished shards")
    for name in STARTS:
        if name != "audit":
            manifest.with_name(RECORD).unlink(missing_ok=True)
            show(name, "hashing")
        show(name, "later" if name != "audit" else "hashing")


def show_work(folder: Path, most_tokens: int, device: str) -> None:
    row("validation tokens", "seconds", "core-seconds", "peak MiB", "bytes/token", "GPU MiB")
    for tokens in (most_tokens // 64, most_tokens // 16, most_tokens // 4, most_tokens):
        write_scored_text(folder, tokens)
        for name in WORK:
            (found,) = in_own_process(
                ["--measure", name, "--folder", str(folder), "--device", device]
            )
            row(
                f"{tokens:>11,} {name}",
                f"{found['seconds']:.2f}",
                f"{found['core_seconds']:.2f}",
                mib(found["peak"]),
                f"{found['peak'] / tokens:.0f}",
                mib(found["gpu"]),
            )


def show_processes(folder: Path, tokens: int, processes: int, device: str) -> None:
    write_scored_text(folder, tokens)
    row("scores and table", "seconds", "own peak MiB", "share MiB", "bytes/token")
    for count in sorted({1, processes}):
        found = in_own_process(
            ["--measure", "scores and table", "--folder", str(folder), "--device", device], count
        )
        for number, one in enumerate(sorted(found, key=lambda one: -one["share"])):
            row(
                f"{count} processes, number {number}",
                f"{one['seconds']:.2f}",
                mib(one["peak"]),
                mib(one["share"]),
                f"{one['share'] / tokens:.0f}",
            )
        row(f"{count} processes together", "", "", mib(sum(one["share"] for one in found)))


@contextmanager
def working_folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        yield folder
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, help="of training shards")
    parser.add_argument("--validation-tokens", type=int)
    parser.add_argument("--processes", type=int, default=1, help="that share the scoring")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the synthetic data there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(work_of(options), options.device)), flush=True)
        return
    if options.gigabytes is None and options.validation_tokens is None:
        parser.error("name --gigabytes or --validation-tokens")
    with working_folder(options) as folder:
        if options.gigabytes is not None:
            show_starts(folder, options.gigabytes)
        if options.validation_tokens is None:
            return
        if options.processes > 1:
            show_processes(folder, options.validation_tokens, options.processes, options.device)
        else:
            show_work(folder, options.validation_tokens, options.device)


def work_of(options: argparse.Namespace) -> Callable[[], None]:
    name, folder = options.measure, options.folder
    if name == "tokenize":
        return partial(tokenize, folder)
    if name in STARTS:
        return partial(STARTS[name], folder / "dataset/manifest.json")
    return partial(WORK[name], folder, options.device)


if __name__ == "__main__":
    main()
