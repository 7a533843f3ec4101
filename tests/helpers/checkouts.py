"""Copies of the checkout with a tiny configuration, and Snakemake runs in them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from fairway.settings import merge
from fairway.stages import STAGES
from tiny import ROOT, TINY_CONFIG, synthetic_documents, write_jsonl

CONFIG_FILE = "tiny.yaml"
TEXT = "text/documents.jsonl"
SEED = TINY_CONFIG["seeds"][0]
RESULTS = f"results/{TINY_CONFIG['run']}"
FOLDERS = {"shared": "train", "leaky": "ttt"}
"""TINY_CONFIG's folders under a seed's, each with the first stage that lies in it."""
ALL = " ".join(STAGES)
# Snakemake with the interpreter that runs the tests, and one thread, as the results are compared.
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--cores", "2")
# Before targets there must be an option, as --configfile takes any number of files.
COMMAND = (*SNAKEMAKE, "--configfile", CONFIG_FILE, "--show-failed-logs")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Compiled modules are kept and copied with a project, as every user has them.
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)

# Started once: loading Snakemake, and what the settings' classes import, takes longer than a dry
# run. Each request is a forked process, which imports fairway itself from its folder's checkout.
DRY_RUN_SERVER = """
import json, os, sys
import pandas, pyarrow.parquet, pydantic, requests, safetensors.torch, scipy.stats, torch
from snakemake.cli import get_argument_parser, main

get_argument_parser()  # imports plugins

for line in sys.stdin:
    folder, arguments, output = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["snakemake", *arguments]
        main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class DryRuns:
    """Answers which jobs Snakemake would run in a folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.server = subprocess.Popen(
            [sys.executable, "-c", DRY_RUN_SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self.count = 0

    def run(self, folder: Path, *arguments: str) -> tuple[int, str]:
        """Exit status and output of `snakemake -n`."""
        self.count += 1
        path = self.scratch / f"{self.count}.txt"
        print(json.dumps([str(folder), ["-n", *arguments], str(path)]), file=self.server.stdin)
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        output = path.read_text()
        print(output)  # for pytest to show where a test fails
        return code, output

    def jobs(self, folder: Path, *arguments: str, config: str = CONFIG_FILE) -> set[str]:
        """Each job that `snakemake -n` with a configuration, by default the tiny one, lists."""
        # Targets come first: --configfile takes any number of files.
        code, output = self.run(folder, *arguments, "--configfile", config)
        assert code == 0, output
        return parse_jobs(output)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def parse_jobs(output: str) -> set[str]:
    """Jobs in Snakemake's output, by their messages: `tokenize`, `report`, `ttt 7 leaky`."""
    messages = re.findall(r"^Job \d+: (\w+): (?:seed (\d+), ([\w.-]+))?", output, re.MULTILINE)
    return {" ".join(part for part in message if part) for message in messages}


def jobs_of(stages: str, folders: Mapping[str, str] = FOLDERS, seed: int = SEED) -> set[str]:
    """The jobs of `stages` (names with spaces between) for one seed.

    folders: those under the seed's, each with the first stage that lies in it.
    """
    order = list(STAGES)
    return {
        f"{stage} {seed} {folder}" if STAGES[stage].per == "variant" else stage
        for stage in stages.split()
        for folder, first in folders.items()
        if STAGES[stage].per != "variant" or order.index(stage) >= order.index(first)
    }


def from_stage(stage: str) -> str:
    """`stage` and every stage after it."""
    return ALL[ALL.index(stage) :]


def copy_checkout(folder: Path) -> Path:
    """A fresh clone of the checkout, changes that are not committed included: new mtimes."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def make_project(folder: Path, **changes) -> Path:
    """A clone with text of its own and the tiny configuration over config.yaml."""
    copy_checkout(folder)
    (folder / TEXT).parent.mkdir()
    write_jsonl(folder / TEXT, synthetic_documents(60))
    write_config(folder, merge(project_config(), changes))
    return folder


def project_config() -> dict:
    """TINY_CONFIG with the project's text, no recipe under it, and as short an audit as may be."""
    return {
        "recipe": None,
        **TINY_CONFIG,
        "data": {**TINY_CONFIG["data"], "paths": [TEXT]},
        "audit": {"flips": 2, "stream_tokens": 64, "null_tokens": 64},
    }


def read_config(folder: Path) -> dict:
    return yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def write_config(folder: Path, config: dict) -> None:
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def change_config(folder: Path, changes: dict) -> None:
    """Merge `changes` over the project's configuration."""
    write_config(folder, merge(read_config(folder), changes))


def snakemake(
    folder: Path, *arguments: str, config: str = CONFIG_FILE, check: bool = True, **environment: str
):
    """Run Snakemake for real, by default with the tiny configuration; targets come first."""
    done = subprocess.run(
        [*SNAKEMAKE, *arguments, "--configfile", config],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**ENVIRONMENT, **environment},
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done
