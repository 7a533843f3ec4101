"""One process or many: what torchrun started, behind one small object."""

import os
import platform
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fairway.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place among those that torchrun started."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device; UserError where CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "runtime.device is 'cuda' but PyTorch sees no GPU: use 'auto' or 'cpu', or install a "
            "CUDA build"
        )
    return torch.device(name)


@contextmanager
def distributed_world(device_name: str) -> Iterator[World]:
    """Join the process group that torchrun announced, or run alone.

    NCCL serves tensors on GPUs, gloo those on CPUs.
    """
    device = resolve_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started local rank {local_rank} but only "
                f"{torch.cuda.device_count()} GPUs are visible: lower --nproc_per_node or ask for "
                "more GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def gather_objects(world: World, value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered


def gather_on_main(world: World, value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on the first rank; nothing on the others."""
    if world.size == 1:
        return [value]
    gathered = [None] * world.size if world.is_main else None
    dist.gather_object(value, gathered)
    return gathered or []


def is_lost_process(error: BaseException) -> bool:
    """Whether `error` says that another of the processes that torchrun started cannot be reached.

    gloo tells that in a plain RuntimeError.
    """
    lost = "gloo|nccl|connection|peer|socket|store|heartbeat|timed? ?out"
    return (
        os.environ.get("WORLD_SIZE", "1") != "1"
        and isinstance(error, RuntimeError)
        and (isinstance(error, dist.DistError) or bool(re.search(lost, str(error), re.IGNORECASE)))
    )


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU's allocator on CUDA, else of this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """The GPU's marketing name, or the processor's name, architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = [processor_name(), platform.machine(), f"{torch.get_num_threads()} threads"]
    return f"cpu ({', '.join(filter(None, told))})"


def processor_name() -> str:
    """What the processor calls itself; nothing where the system does not say."""
    with suppress(OSError):  # Linux only
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return " ".join(found[1].split())
    return platform.processor() if platform.processor() != platform.machine() else ""
