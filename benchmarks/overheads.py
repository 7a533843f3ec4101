"""Where the seconds of a finished run's jobs went, stage by stage.

    python benchmarks/overheads.py results/quickstart

Means over the seeds and folders of a stage. `job` is Snakemake's own count, from the shell's start
to its end; `beyond work` is what of it was neither the stage's work nor the wait for a GPU.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from fairway.errors import UserError
from fairway.metrics import read_metrics
from fairway.phases import Phase
from fairway.stage import user_errors
from fairway.stages import STAGES, made_by


def jobs(run: Path) -> Iterator[dict[str, Any]]:
    """A row for each job: stage, job (seconds), and the phases' seconds."""
    for stage in STAGES.values():
        pattern = {"variant": "seed-*/*/", "run": ""}.get(stage.per, "no such folder/")
        for path in sorted(run.glob(f"{pattern}{stage.name}/metrics.json")):
            benchmark = run / "benchmarks" / path.parent.relative_to(run).with_suffix(".tsv")
            told = pd.read_csv(benchmark, sep="\t") if benchmark.exists() else {"s": [None]}
            phases = read_metrics(path, stage.name, made_by(stage.name))["phase_seconds"]
            yield {"stage": stage.name, "job": list(told["s"])[-1], **phases}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, such as results/quickstart")
    run = parser.parse_args().run
    table = pd.DataFrame(jobs(run))
    if table.empty:
        raise UserError(f"{run} holds no finished stages: name a run's folder")
    grouped = table.groupby("stage", sort=False)
    means = grouped[["job", *get_args(Phase)]].mean()
    means["beyond work"] = means["job"] - means["wait"] - means["work"]
    means.insert(0, "jobs", grouped.size())
    print(means.round(1).to_string())


if __name__ == "__main__":
    with user_errors():
        main()
