"""A Slurm cluster of one node on the loopback: munged, slurmctld and slurmd, as this user."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "squeue", "scancel", "scontrol")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PACKAGES = "apt-get install slurmctld slurmd slurm-client munge"
GPUS = "/dev/null,/dev/zero"
START_SECONDS = 60

SETTINGS = """
ClusterName=fairway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
MinJobAge=3600
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:2
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


@contextmanager
def slurm_cluster(
    folder: Path, *, environment: Mapping[str, str], cpus: int = 8, memory: int = 64_000
) -> Iterator[Mapping[str, str]]:
    """Start the daemons; an environment in which Slurm's programs find them.

    memory: megabytes that the node claims to have. Its two GPUs are devices that every machine has.
    """
    for name in ("state", "spool", "programs"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(
        SETTINGS.format(
            folder=folder, host=host, user=getpass.getuser(), cpus=cpus, memory=memory,
            controller=free_port(), daemon=free_port(),
        ),
        encoding="utf-8",
    )  # fmt: skip
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={GPUS}\n", encoding="utf-8")
    # The plugin takes SLURM_CONF away from it.
    srun = folder / "programs/srun"
    srun.write_text(
        f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n',
        encoding="utf-8",
    )
    srun.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {
        **environment,
        "PATH": f"{folder}/programs:{PATH}",
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    munged = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
        f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
    ]  # fmt: skip
    with ExitStack() as daemons:
        daemons.enter_context(daemon(munged, folder, environment))
        wait_for(lambda: (folder / "munge.socket").exists(), folder)
        daemons.enter_context(daemon(["slurmctld", "-D"], folder, environment))
        daemons.enter_context(daemon(["slurmd", "-D"], folder, environment))
        wait_for(lambda: ask(environment, "sinfo", "-h", "-o", "%T") == "idle", folder)
        yield environment
        ask(environment, "scancel", f"--user={getpass.getuser()}")
        wait_for(lambda: not ask(environment, "squeue", "-h"), folder)


@contextmanager
def daemon(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    with (folder / f"{command[0]}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(environment: Mapping[str, str], *command: str) -> str:
    """What one of Slurm's programs prints; nothing where it fails."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else ""


def wait_for(holds, folder: Path, seconds: float = START_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            logs = (f"{path.name}\n{path.read_text()[-2000:]}" for path in folder.glob("*.log"))
            raise TimeoutError("\n\n".join(logs))
        time.sleep(0.1)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
