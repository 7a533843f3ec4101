"""Compile every Triton kernel for Hopper, on any machine; print what each one uses.

Runs of two fused models and of the fused fit launch each kernel with the arguments that the
reference submission's sizes, and a larger model's with all features, give it. Here a launch
compiles and does no more: it needs ptxas, which comes with Triton, and no GPU. The tensors'
contents are therefore garbage.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fairway.evaluation.adapters.fit import logit_delta_kernel
from fairway.evaluation.adapters.lora import BatchedLora, LoraSettings
from fairway.evaluation.adapters.slot import SlotSettings
from fairway.evaluation.settings import EvaluationSettings
from fairway.model.fused import embedding, heads, mlp_hopper, residual
from fairway.model.fused import forward_backward as fused
from fairway.model.fused.tiles import multiprocessors
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig

FRONTIER = {
    "vocab_size": 8192,
    "mlp_width": 2048,
    "bigram_buckets": 0,
    "value_layers": (),
    "activation_slope": 0.3,
    "head_gate_dimensions": 12,
    "smear": "input",
    "skip_gates": True,
    "recurrent_layers": (3, 4, 5),
    "recurrence_passes": 3,
    "asymmetric_softcap": True,
}
"""A model with every part that has kernels, or variants of kernels, of its own."""

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
launch = JITFunction.run
seen: set[int] = set()

REGISTERS, SHARED_BYTES, MULTIPROCESSORS = 65536, 233472, multiprocessors(torch.device("cpu"))
"""Of a multiprocessor of Hopper, and how many it has."""
REGISTERS_AT_ONCE, RESERVED_BYTES = 256, 1024
"""A warp's registers come in multiples of the first; each program takes the second besides."""


class HopperWithoutDevice:
    """What Triton asks a driver for before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(function, *arguments, grid=None, warmup=False, **options):
    kernel = launch(function, *arguments, grid=grid, warmup=True, **options)
    if id(kernel) not in seen:
        seen.add(id(kernel))
        shares_rows = "PROGRAMS" in function.arg_names and grid[0] % MULTIPROCESSORS == 0
        print(f"{function.__name__}: {usage(kernel, grid[0] if shares_rows else 0)}", flush=True)
    return kernel


def usage(kernel, programs: int) -> str:
    """programs: those that share all rows, and should be resident at the same time; or 0."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        re.search(rf"{key}:(\d+)", text)[1] for key in ("REG", "STACK", "LOCAL")
    )
    shared = kernel.metadata.shared
    words = f"{registers} registers, {shared} bytes shared, {int(stack) + int(local)} bytes spilled"
    if not programs:
        return words
    of_warp = -(-32 * int(registers) // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    resident = min(
        REGISTERS // (of_warp * kernel.metadata.num_warps),
        SHARED_BYTES // (shared + RESERVED_BYTES),
    )
    return f"{words}, {programs // MULTIPROCESSORS} programs of {resident}"


def all_programs(x: torch.Tensor, per_multiprocessor: int) -> int:
    """`programs_over` for as many rows as a GPU computes, whatever x has."""
    return per_multiprocessor * MULTIPROCESSORS


def compile_fit(window_tokens: int, vocabulary: int, slot: SlotSettings) -> None:
    """The fit of one lane over a window, and logits made into its probabilities."""
    probabilities = logit_delta_kernel.compact_softmax(torch.zeros(1, window_tokens, vocabulary))
    logit_delta_kernel.fit_delta(
        probabilities,
        torch.zeros(1, window_tokens, dtype=torch.int64),
        torch.ones(1, window_tokens, dtype=torch.bool),
        torch.zeros(1, vocabulary),
        l2=slot.l2,
        clamp=slot.clamp,
        iterations=slot.iterations,
        history=slot.history,
    )


def compile_adapted(model: GPT, tokens: torch.Tensor) -> None:
    """The kernels beside a row's own products; `down` is computed in another way than `up`."""
    for projection in ("up", "down"):
        additions = BatchedLora(model, 1, LoraSettings(projections=(projection,)), seed=0)
        additions.learn(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))


def compile_mlp_hopper(width: int, mlp_width: int, slope: float) -> None:
    """The kernels that replace the MLP's on Hopper; a CPU's tensors do not choose them."""
    rows, up, down, activation = (
        torch.empty(shape, dtype=torch.bfloat16)
        for shape in ((256, width), (mlp_width, width), (width, mlp_width), (256, mlp_width))
    )
    for signed in (True, False):
        mlp_hopper.up(rows, up, activation, slope, signed)
    mlp_hopper.down_backward(rows, down, activation, torch.empty_like(activation), slope)


def main() -> None:
    driver.set_active(HopperWithoutDevice())
    JITFunction.run = compile_only
    for module in (embedding, heads, residual):
        module.programs_over = all_programs
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    for changes in ({}, FRONTIER):
        config = GPTConfig(**changes)
        model = GPT(config)
        model.compute_dtype, model.backend = torch.bfloat16, fused
        model.loss(tokens, tokens).backward()
        model.key_copies = config.heads // config.kv_heads
        model.loss(tokens, tokens).backward()
        with torch.no_grad():
            model(tokens, 32)
    compile_mlp_hopper(config.width, config.mlp_width, config.activation_slope)
    compile_adapted(model, tokens)
    compile_fit(EvaluationSettings().window_tokens, GPTConfig().vocab_size, SlotSettings())


if __name__ == "__main__":
    main()
