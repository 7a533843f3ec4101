"""A workflow that is killed at random times, and resumed until it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from checkouts import COMMAND, ENVIRONMENT, make_project, parse_jobs, snakemake
from faults import Try, contents, differences

RESUME = (sys.executable, "-m", "fairway.cli", "resume")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PRODUCTS = (".bin", ".model", ".safetensors", ".parquet")


def workflow_tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """Stop a small workflow with each signal, in a random order and at random times; resume it."""
    chance = Random(seed)
    whole = make_project(folder / "uninterrupted", variants={"leaky": None})
    snakemake(whole)
    expected = products(whole)
    for number in range(count):
        project = make_project(folder / f"killed-{number}", variants={"leaky": None})
        signals = chance.sample(SIGNALS, len(SIGNALS))
        waits = [chance.uniform(0, 12) for _ in signals]
        stops = [f"{one.name} after {wait:.1f} s" for one, wait in zip(signals, waits, strict=True)]
        yield Try("workflow", ", ".join(stops), disturb(project, signals, waits, expected))


def disturb(project: Path, signals: list, waits: list[float], expected: dict[str, str]) -> str:
    """`same bytes`, or what is wrong in the end."""
    command, done = COMMAND, set()
    for number, wait in zip(signals, waits, strict=True):
        output = stop(project, command, number, wait)
        if redone := done & parse_jobs(output):
            return f"done again: {redone}"
        done |= finished_jobs(output)
        command = RESUME
    last = subprocess.run(
        command, cwd=project, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if last.returncode != 0:
        return f"not resumed: {last.stdout[-1000:]}{last.stderr[-1000:]}"
    if redone := done & parse_jobs(last.stdout + last.stderr):
        return f"done again: {redone}"
    wrong = differences(products(project), expected)
    return f"other files: {wrong}" if wrong else "same bytes"


def stop(project: Path, command: tuple[str, ...], number: signal.Signals, wait: float) -> str:
    """Start a command, and send its process group a signal, `wait` seconds after its first job."""
    log = project / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=project, env=ENVIRONMENT, start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while process.poll() is None and "\nJob " not in log.read_text():
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait)
    if process.poll() is None:
        os.killpg(process.pid, number)
        process.wait()
    return log.read_text()


def finished_jobs(output: str) -> set[str]:
    """The jobs that Snakemake itself saw the end of: one killed at its last write is redone."""
    finished = set(re.findall(r"^Finished jobid: (\d+)", output, re.MULTILINE))
    started = re.findall(r"^(Job (\d+): .*)$", output, re.MULTILINE)
    return parse_jobs("\n".join(line for line, number in started if number in finished))


def products(project: Path) -> dict[str, str]:
    """Whatever holds no seconds, and hidden files.

    A folder is none: that of train's checkpoints is there, and empty, once one was written.
    """
    return {
        name: digest
        for name, digest in contents(project / "results").items()
        if (project / "results" / name).is_file()
        and ((name.endswith(PRODUCTS) and "/report/" not in name) or "/." in name)
    }
