"""GPUs for one job: `python -m fairway.allot COUNT SCRIPT ...` runs a stage's script on free ones.

COUNT 0 leaves the GPUs alone; with several the script runs under torchrun, one process for each.
A script of one GPU takes it by `take_wanted` once it has loaded its libraries, so that the next
job can do so while the GPU is still at work for the one before.
The GPUs are those that CUDA_VISIBLE_DEVICES names, or else all that are there. A job takes one by
locking a file under the machine's folder for temporary files, until its process is gone: nothing
has to be given back after a kill, and no service keeps count. Where too few are free the job waits.

It loads the standard library only, for every job of the workflow starts with it.
"""

import fcntl
import gc
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.1
MESSAGE_EVERY = 600
"""Looks between two messages about the wait."""
JOB_STARTED = "FAIRWAY_JOB_STARTED"
"""Environment variable: seconds since the epoch when the job of several GPUs had them."""
WANTED = "FAIRWAY_GPUS"
"""Environment variable: GPUs that this process was started to take; not there for none."""
QUERY = ("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader")


def installed_gpus() -> dict[str, str]:
    """Index → UUID of the GPUs that nvidia-smi shows; none where there is no such program."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(",") for line in done.stdout.splitlines())
    return {index.strip(): uuid.strip() for index, _, uuid in pairs}


def visible_gpus(installed: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, as it names it, or else every installed GPU's index."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(installed)
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def take(count: int) -> list[str]:
    """Lock `count` of the visible GPUs for as long as this process lives, and return their names.

    Waits where too few are free; ends the process with a line where there are not so many.
    """
    installed = installed_gpus()
    visible = visible_gpus(installed)
    if count > len(visible):
        seen = f"{len(visible)} ({', '.join(visible)})" if visible else "none"
        sys.exit(
            f"error: this job needs {count} of the machine's GPUs, found {seen}: lower "
            "gpus.machine or the stage's own key in `gpus`, name more in CUDA_VISIBLE_DEVICES, or "
            "set runtime.device to cpu"
        )
    looks = 0
    while len(taken := _lock_free(visible, installed, count)) < count:
        if looks % MESSAGE_EVERY == 0:
            print(f"waiting for {count} of the GPUs {', '.join(visible)}", file=sys.stderr)
        looks += 1
        time.sleep(POLL_SECONDS)
    return taken


def take_wanted() -> None:
    """Take the GPUs that this process was started for, if any.

    To be called before CUDA is: it finds out which GPUs are visible only once.
    """
    if WANTED in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(take(int(os.environ.pop(WANTED))))


def _lock_free(visible: Sequence[str], installed: Mapping[str, str], count: int) -> list[str]:
    """Names of locked GPUs, `count` of them or none."""
    held: dict[str, int] = {}
    for name in visible:
        # By UUID: a cluster may call different GPUs of its jobs by the same index.
        descriptor = _open(f"fairway-gpu-{installed.get(name, name).replace('/', '-')}.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held[name] = descriptor
        except BlockingIOError:
            os.close(descriptor)
        if len(held) == count:
            return list(held)
    for descriptor in held.values():
        os.close(descriptor)
    return []


def _open(name: str) -> int:
    path = Path(tempfile.gettempdir(), name)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(PermissionError):  # another user's: theirs to open to everybody
        os.fchmod(descriptor, 0o666)
    return descriptor


def main(arguments: Sequence[str]) -> None:
    count, script = int(arguments[0]), list(arguments[1:])
    if count:
        os.environ[WANTED] = str(count)
    if count > 1:
        take_wanted()
        os.environ[JOB_STARTED] = str(time.time())
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={count}"]
        sys.argv = [*launcher, "-m", "fairway.allot", "0", *script]
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    else:
        # PyTorch's is_available() would ask the driver, which sees the same GPUs from then on.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        gc.disable()  # until `run_stage`: it would search PyTorch's modules many times
        sys.argv, sys.path[0] = script, str(Path(script[0]).resolve().parent)
        runpy.run_path(script[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
