"""How the kernels cut their work: tiles of whole rows, and programs that run over many tiles.

Arithmetic is float32 whatever the activations' dtype. Sums over all rows, the gradients of
per-channel parameters, are left as one partial sum per program, so that they do not depend on
timing. Shapes: M rows (tokens), C channels.
"""

import torch
import triton
import triton.language as tl

ELEMENTS_PER_TILE = 4096
PROGRAMS = 1056
"""Of a kernel that sums over rows: 8 for each of an H200's 132 multiprocessors."""


def row_tile(x: torch.Tensor, elements: int = ELEMENTS_PER_TILE) -> tuple[int, int]:
    """Rows of a tile of x [M, C], and the power of two that covers its channels."""
    wide = triton.next_power_of_2(x.shape[1])
    return max(1, elements // wide), wide


def row_grid(x: torch.Tensor) -> tuple[int]:
    """One program for each tile of x [M, C]."""
    return (triton.cdiv(x.shape[0], row_tile(x)[0]),)


def programs_over(rows: int, rows_per_tile: int) -> int:
    """Programs of a kernel that sums over `rows`."""
    return min(PROGRAMS, triton.cdiv(rows, rows_per_tile))


@triton.jit
def rows_of(block, M, C, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """A tile's rows, its elements' offsets and which of them exist."""
    rows = block * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDE)[None, :]
    return rows, rows.to(tl.int64)[:, None] * C + channels, (rows < M)[:, None] & (channels < C)
