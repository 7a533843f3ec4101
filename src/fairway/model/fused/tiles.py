"""How the kernels cut their work: tiles of whole rows, and programs that run over many rows.

Arithmetic is float32 whatever the activations' dtype. Sums over all rows, the gradients of
per-channel parameters, are left as one partial sum per program, so that they do not depend on
timing. Such a program takes a row at a time, in as few warps as hold it: its sums stay in
registers, and with one warp none waits for another. Shapes: M rows (tokens), C channels.
"""

from functools import cache

import torch
import triton
import triton.language as tl

ELEMENTS_PER_TILE = 4096


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; on a CPU, how many to cut the work for.

    Kernels that are only compiled there are cut as for an H200. Those that Triton interprets are
    cut for one, so that a program takes several tiles as it does on a GPU.
    """
    if device.type != "cuda":
        return 1 if triton.knobs.runtime.interpret else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_tile(x: torch.Tensor) -> tuple[int, int]:
    """Rows of a tile of x [M, C], and the power of two that covers its channels."""
    wide = triton.next_power_of_2(x.shape[1])
    return max(1, ELEMENTS_PER_TILE // wide), wide


def row_grid(x: torch.Tensor) -> tuple[int]:
    """One program for each tile of x [M, C]."""
    return (triton.cdiv(x.shape[0], row_tile(x)[0]),)


def one_row(x: torch.Tensor) -> tuple[int, int]:
    """The tile of a program that sums over rows of x [M, C]."""
    return 1, triton.next_power_of_2(x.shape[1])


def programs_over(x: torch.Tensor, per_multiprocessor: int) -> int:
    """Programs of a kernel that sums over rows of x: as many as find registers at the same time."""
    return min(multiprocessors(x.device) * per_multiprocessor, len(x))


@triton.jit
def rows_of(block, M, C, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """A tile's rows, its elements' offsets and which of them exist."""
    rows = block * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDE)[None, :]
    return rows, rows.to(tl.int64)[:, None] * C + channels, (rows < M)[:, None] & (channels < C)


@triton.jit
def add_to_own(at, value, mask):
    """Add to a program's own partial sums, where no other program adds.

    Atomically, for a load and a store would take registers that the loop before them needs.
    """
    tl.atomic_add(at, value, mask, sem="relaxed")
