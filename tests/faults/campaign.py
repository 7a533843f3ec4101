"""Disturb tiny runs in every way that the tests know, and print a table of what came of it.

    python tests/faults/campaign.py --kills 500 --damaged 1000 --workflows 4 \\
        --configs 20000 --data 5000 --products 2000

Every number is of tries; what is not named is not tried. What ends as nothing may is told on stderr
with what to do to see it again, and makes the exit status 1.
"""

import argparse
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import malformed_configs
import malformed_data
import malformed_products
from faults import Run, damage_tries, kill_tries
from killed_workflows import workflow_tries

COLUMNS = {
    "right result": ("same bytes", "right result", "right", "accepted"),
    "refused in one line": ("refused",),
    "FAIL of the audit": ("FAIL verdict",),
}
Counts = dict[str, Counter[str]]
"""What was disturbed → how often it ended how."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    for name in ("kills", "damaged", "workflows", "configs", "data", "products"):
        parser.add_argument(f"--{name}", type=int, default=0, metavar="TRIES")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(options.processes, get_context("spawn")) as pool,
    ):
        found = [task.result() for task in submit(pool, Path(scratch), options)]
    counts: Counts = {}
    for part in found:
        for kind, outcomes in part.items():
            counts.setdefault(kind, Counter()).update(outcomes)
    print("\n".join(table(counts)))
    return int(any(faults(outcomes) for outcomes in counts.values()))


def submit(pool: ProcessPoolExecutor, scratch: Path, options: argparse.Namespace) -> list:
    """Scripts and files are shared out among the processes, the rest goes in between."""
    seeds = range(options.seed, options.seed + options.processes)
    kills, damaged = options.kills // len(seeds), options.damaged // len(seeds)
    folders = {name: scratch / name for name in ("workflows", "data", "products")}
    return [
        *(pool.submit(disturb, scratch / f"run-{one}", one, kills, damaged) for one in seeds),
        pool.submit(workflows, folders["workflows"], options.seed, options.workflows),
        pool.submit(configs, options.seed, options.configs),
        pool.submit(data, folders["data"], options.seed, options.data),
        pool.submit(products, folders["products"], options.seed, options.products),
    ]


def disturb(folder: Path, seed: int, kills: int, damaged: int) -> Counts:
    run = Run(folder)
    counts = counted(kill_tries(run, seed, kills), "`{}` killed")
    return counts | counted(damage_tries(run, seed, damaged), "a file that a stage reads: {}")


def workflows(folder: Path, seed: int, count: int) -> Counts:
    return counted(workflow_tries(folder, seed, count) if count else (), "the {} killed")


def configs(seed: int, count: int) -> Counts:
    return {"configs malformed": malformed_configs.run(seed, count)}


def data(folder: Path, seed: int, count: int) -> Counts:
    folder.mkdir()
    return {"texts, tokenizers, datasets malformed": malformed_data.run(folder, seed, count)}


def products(folder: Path, seed: int, count: int) -> Counts:
    run = Run(folder).work / "results/tiny" if count else folder
    return {"products malformed": malformed_products.run(run, seed, count)}


def counted(tries, name: str) -> Counts:
    """Counts by kind, and a line on stderr for each fault."""
    counts: Counts = {}
    for one in tries:
        kind, _, shown = one.outcome.partition(": ")
        counts.setdefault(name.format(one.kind), Counter())[kind] += 1
        if one.is_fault:
            print(f"{one.kind}: {one.what}\n  {kind}: {shown}", file=sys.stderr, flush=True)
    return counts


def faults(outcomes: Counter[str]) -> int:
    allowed = {outcome for outcomes in COLUMNS.values() for outcome in outcomes}
    return sum(number for outcome, number in outcomes.items() if outcome not in allowed)


def table(counts: Counts) -> list[str]:
    """Markdown: a row for each kind of disturbance, and their sum."""
    rows = {kind: outcomes for kind, outcomes in counts.items() if outcomes.total()}
    rows["**all**"] = sum(rows.values(), Counter())
    head = ("disturbed", "tries", *COLUMNS, "anything else")
    lines = [head, ["---"] * len(head)]
    for kind, outcomes in rows.items():
        ends = [sum(outcomes[end] for end in column) for column in COLUMNS.values()]
        lines.append([kind, *(f"{n:,}" for n in (outcomes.total(), *ends, faults(outcomes)))])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
