"""What this machine can do at best, measured in the same run, and what the stages ask of it."""

import math
from dataclasses import dataclass

import torch
from timing import median_seconds

from fairway.model.spec import BANKS, GPTConfig, parameters

NOMINAL_FLOPS_PER_SECOND = 989e12
"""Dense bf16 of an H100 or H200 SXM, from the data sheet."""

CALLS_PER_REPEAT = 5
REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    """Measured rates. matmul_dtype: bfloat16 on CUDA; float32 on a CPU, which computes in that."""

    matmul_flops_per_second: float
    memory_bytes_per_second: float
    matmul_dtype: str
    matmul_size: int
    copied_bytes: int


def measure_ceilings(device: torch.device, seed: int) -> Ceilings:
    """Square matrix products of random numbers; copies inside the device's memory."""
    is_cuda = device.type == "cuda"
    dtype, size = (torch.bfloat16, 8192) if is_cuda else (torch.float32, 512)
    copied_bytes = 2**31 if is_cuda else 2**25
    return Ceilings(
        _matmul_rate(device, dtype, size, seed),
        _copy_rate(device, copied_bytes),
        matmul_dtype=str(dtype).removeprefix("torch."),
        matmul_size=size,
        copied_bytes=copied_bytes,
    )


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seed: int) -> float:
    generator = torch.Generator(device).manual_seed(seed)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(CALLS_PER_REPEAT):
            torch.mm(left, right, out=product)

    return CALLS_PER_REPEAT * 2 * size**3 / median_seconds(device, multiply, REPEATS)


def _copy_rate(device: torch.device, copied_bytes: int) -> float:
    """Bytes read plus bytes written, per second."""
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(CALLS_PER_REPEAT):
            target.copy_(source)

    return CALLS_PER_REPEAT * 2 * copied_bytes / median_seconds(device, copy, REPEATS)


def matrix_parameters(config: GPTConfig) -> int:
    """Numbers in the banks: each costs two operations a token, and four more in the backward.

    Those of a block that recurs count in each pass.
    """
    table = parameters(config)
    return sum(math.prod(table[name].shape) for name in BANKS) * config.steps // config.layers


def train_flops_per_token(config: GPTConfig) -> float:
    """Forward and backward: matrices, tied head, and the causal half of attention."""
    attention = config.steps * config.width * config.sequence_tokens
    return 6.0 * (matrix_parameters(config) + config.vocab_size * config.width + attention)


def window_flops(config: GPTConfig, window_tokens: int, needed_tokens: int) -> float:
    """One forward pass of a window whose last `needed_tokens` logits are wanted.

    Of the last block only keys and values serve the other positions.
    """
    block = matrix_parameters(config) // config.steps
    shared = 2 * config.kv_width * config.width
    head = config.vocab_size * config.width
    everywhere = (config.steps - 1) * (block + config.width * window_tokens) + shared
    visible = 2 * window_tokens - needed_tokens
    at_the_end = block - shared + head + config.width * visible
    return 2.0 * (window_tokens * everywhere + needed_tokens * at_the_end)


def generation_bytes(config: GPTConfig, sequences: int, tokens: int, number_bytes: int) -> float:
    """Read while sampling with a cache: every matrix at each step, and the keys and values so far.

    number_bytes: 2 for bfloat16, 4 for float32.
    """
    weights = matrix_parameters(config) + config.vocab_size * config.width
    cached = 2 * config.steps * config.kv_width * sequences * (tokens - 1) / 2
    return number_bytes * (tokens - 1) * (weights + cached)


def optimizer_floor_seconds(
    config: GPTConfig, newton_schulz_steps: int, trackers: int, ceilings: Ceilings
) -> float:
    """Newton–Schulz at the matmul ceiling, then each number moved once at the memory ceiling.

    Float32 reads and writes of a parameter: its gradient for the norm; Muon: gradient, momentum
    twice, weight twice; AdamW: two more for the second moment; each average: three.
    """
    flops, moved = 0.0, 0.0
    for name, parameter in parameters(config).items():
        shape, numbers = parameter.shape, math.prod(parameter.shape)
        moved += 4 * numbers * ((6 if name in BANKS else 8) + 3 * trackers)
        if name in BANKS:
            matrices, small, large = shape[0], min(shape[1:]), max(shape[1:])
            products = 4 * small**2 * large + 2 * small**3
            flops += matrices * newton_schulz_steps * products
    return flops / ceilings.matmul_flops_per_second + moved / ceilings.memory_bytes_per_second


def hessian_flops(config: GPTConfig, sequences: int, tokens: int) -> float:
    """A forward pass, and the products of every matrix's inputs with themselves."""
    attention = config.width * tokens
    block = 3 * config.width**2 + config.mlp_width**2 + attention
    inputs = config.steps * block + config.width**2
    return 2.0 * sequences * tokens * (matrix_parameters(config) + inputs)


def gptq_flops(config: GPTConfig, candidates: int) -> float:
    """Spreading each column's error over the columns still to come, for every clip candidate."""
    table = parameters(config)
    shapes = (table[name].shape for name in BANKS)
    return sum(float(n * candidates * rows * columns**2) for n, rows, columns in shapes)
