"""Compile every Triton kernel for Hopper, on any machine; print what each one uses.

A run of the fused model and of the fused fit launches each kernel with the arguments that the
record's sizes give it. Here a launch compiles and does no more: it needs ptxas, which comes with
Triton, and no GPU. The tensors' contents are therefore garbage.
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

from fairway.config import load_config
from fairway.evaluation.adapters.fit import logit_delta_kernel
from fairway.evaluation.adapters.lora import LoraSettings, RowLora
from fairway.model.fused import forward_backward as fused
from fairway.model.fused import mlp_hopper
from fairway.model.gpt import GPT, config_from_settings

ROOT = Path(__file__).resolve().parents[1]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
launch = JITFunction.run
seen: set[int] = set()


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
        print(f"{function.__name__}: {usage(kernel)}", flush=True)
    return kernel


def usage(kernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        re.search(rf"{key}:(\d+)", text)[1] for key in ("REG", "STACK", "LOCAL")
    )
    shared = kernel.metadata.shared
    return f"{registers} registers, {shared} bytes shared, {int(stack) + int(local)} bytes spilled"


def compile_fit(window_tokens: int, slot: dict) -> None:
    """The fit of one lane over a record's window, and of logits made into its probabilities."""
    places, vocabulary = window_tokens, 1024
    probabilities = logit_delta_kernel.compact_softmax(torch.zeros(1, places, vocabulary))
    logit_delta_kernel.fit_delta(
        probabilities,
        torch.zeros(1, places, dtype=torch.int64),
        torch.ones(1, places, dtype=torch.bool),
        torch.zeros(1, vocabulary),
        **{key: slot[key] for key in ("l2", "clamp", "iterations", "history")},
    )


def compile_adapted(model: GPT, tokens: torch.Tensor, lora: dict) -> None:
    """What runs beside a row's own products; `down` is computed in another way than `up`."""
    for projection in ("up", "down"):
        settings = LoraSettings(**{**lora, "projections": (projection,)})
        additions = RowLora(model, 1, settings, seed=0)
        additions.learn(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))


def compile_mlp_hopper(width: int, mlp_width: int) -> None:
    """What takes the place of the MLP's kernels on Hopper; a CPU's tensors do not choose it."""
    rows, up, down, activation = (
        torch.empty(shape, dtype=torch.bfloat16)
        for shape in ((256, width), (mlp_width, width), (width, mlp_width), (256, mlp_width))
    )
    for signed in (True, False):
        mlp_hopper.up(rows, up, activation, signed)
    mlp_hopper.down_backward(rows, down, activation, torch.empty_like(activation))


def main() -> None:
    driver.set_active(HopperWithoutDevice())
    JITFunction.run = compile_only
    config = load_config([ROOT / "config.yaml", ROOT / "config/record.yaml"])
    sequence_tokens = config["train"]["sequence_tokens"]
    model = GPT(config_from_settings(config["model"], 1024, sequence_tokens))
    model.compute_dtype, model.kernels = torch.bfloat16, "fused"
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    model.loss(tokens, tokens).backward()
    fused.key_copies = lambda backend, queries_per_key: queries_per_key
    model.loss(tokens, tokens).backward()
    with torch.no_grad():
        model(tokens, 32)
    compile_mlp_hopper(model.config.width, model.config.mlp_width)
    compile_adapted(model, tokens, config["lora"])
    compile_fit(config["evaluation"]["window_tokens"], config["slot"])


if __name__ == "__main__":
    main()
