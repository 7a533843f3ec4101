"""Copies of the checkout with a tiny configuration, and Snakemake runs in them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from fairway.settings import merge
from fairway.stages import STAGES, chain
from tiny import ROOT, TINY_CONFIG, synthetic_documents, write_jsonl
from warm_python import warm_python

CONFIG_FILE = "tiny.yaml"
TEXT = "text/documents.jsonl"
SEED = TINY_CONFIG["seeds"][0]
RESULTS = f"results/{TINY_CONFIG['run']}"
FOLDERS = {"shared": "train", "leaky": "ttt"}
"""TINY_CONFIG's folders under a seed's, each with the first stage that lies in it."""
ALL = " ".join(stage.name for stage in chain("report"))
"""What runs where no target is named."""
# Snakemake with one thread, as the results are compared.
OPTIONS = ("-m", "snakemake", "--cores", "2")
# Before targets there must be an option, as --configfile takes any number of files.
COMMAND = (sys.executable, *OPTIONS, "--configfile", CONFIG_FILE, "--show-failed-logs")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Compiled modules are kept and copied with a project, as every user has them.
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


def dry_run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `snakemake -n`."""
    done = subprocess.run(
        [warm_python(), "-m", "snakemake", "-n", *arguments], cwd=folder, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT,
    )  # fmt: skip
    print(done.stdout)  # for pytest to show where a test fails
    return done.returncode, done.stdout


def dry_jobs(folder: Path, *arguments: str, config: str = CONFIG_FILE) -> set[str]:
    """Each job that `snakemake -n` with a configuration, by default the tiny one, lists."""
    # Targets come first: --configfile takes any number of files.
    code, output = dry_run(folder, *arguments, "--configfile", config)
    assert code == 0, output
    return parse_jobs(output)


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
    """Run Snakemake for real, by default with the tiny configuration; targets come first.

    Python is `warm_python()`, for the stages' scripts too; with COMMAND it is Python itself.
    """
    done = subprocess.run(
        [warm_python(), *OPTIONS, *arguments, "--configfile", config],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**ENVIRONMENT, **environment},
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done
