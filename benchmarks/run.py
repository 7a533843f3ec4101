"""Measure Fairway's stages against the reference submission (PR #1350) and against the hardware.

    python benchmarks/run.py --dataset results/data/embedded/manifest.json
    python benchmarks/run.py --dataset ... --size pr1350 --stages train,sliding --output bench.json

Each stage prints its rows when it is done; the last lines are the table of all of them. Exits with
1 where two ways of a stage disagree or a stage fails. benchmarks/README.md tells how to read it.
"""

import argparse
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from bench_adapters import adapters
from bench_evaluation import sliding
from bench_quantization import artifact, gptq, hessians, self_generation
from bench_slot import slot_batch, slot_window
from bench_training import optimizer, train, ttt
from ceilings import measure_ceilings
from context import SIZES, Context, make_context, say
from results import Row, disagreements, number, table, write_results

from fairway.errors import UserError
from fairway.provenance import git_commit, package_versions
from fairway.stage import user_errors

STAGES = {
    stage.__name__: stage
    for stage in (
        train, optimizer, sliding, slot_window, slot_batch, adapters, ttt, self_generation,
        hessians, gptq, artifact,
    )
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    started = time.perf_counter()
    context = make_context(options)
    context.ceilings = measure_ceilings(context.device, options.seed)
    say(describe(context))
    rows: list[Row] = []
    failed: list[str] = []
    for name in options.stages:
        rows += measure(name, context, failed)
        if options.output:
            seconds = time.perf_counter() - started
            write_results(options.output, rows, about(context, failed, seconds))
    say("\n" + table(rows, bars_apply(context)))
    wrong = [*(f"{name} failed" for name in failed), *disagreements(rows)]
    if wrong:
        raise UserError(f"not all is well: {'; '.join(wrong)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True, help="manifest.json of tokenize")
    parser.add_argument(
        "--stages", type=stage_names, default=list(STAGES),
        help=f"separated by commas; all: {','.join(STAGES)}",
    )  # fmt: skip
    parser.add_argument(
        "--size", choices=SIZES, help="the recipe; default: pr1350 on CUDA, quickstart on a CPU"
    )
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[], help="YAML files over the recipe"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="JSON, written anew after each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side; medians count")
    parser.add_argument(
        "--train-steps", type=int, default=100, help="before slot, adapters and artifact"
    )
    parser.add_argument("--micro-batch-sequences", type=int, help="of train; default: the config's")
    parser.add_argument("--windows", type=int, help="of the evaluations; default: a few a lane")
    return parser.parse_args(arguments)


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown stage {', '.join(unknown)}: choose from {', '.join(STAGES)}"
        )
    return names


def measure(name: str, context: Context, failed: list[str]) -> list[Row]:
    """One stage's rows; none where it fails, so that the others are still measured."""
    started = time.perf_counter()
    say(f"\n{name} ...")
    try:
        rows = STAGES[name](context)
    except Exception:  # A lent GPU is dear: whatever one stage dies of, the next one is measured.
        traceback.print_exc(file=sys.stdout)
        failed.append(name)
        rows = []
    context.clean_up()
    for row in rows:
        baseline = f" (baseline {number(row.baseline)})" if row.baseline is not None else ""
        say(f"{name}: {row.measure} {number(row.fast)}{baseline}")
    say(f"{name} took {time.perf_counter() - started:.1f} s")
    return rows


def describe(context: Context) -> str:
    ceilings = context.ceilings
    return (
        f"{device_name(context)}, size {context.options.size}, "
        f"baseline {'compiled' if context.compiles_baseline else 'not compiled'}; "
        "ceilings: "
        f"{ceilings.matmul_flops_per_second / 1e12:.4g} TFLOP/s ({ceilings.matmul_dtype} matmul of "
        f"{ceilings.matmul_size}), {ceilings.memory_bytes_per_second / 1e12:.4g} TB/s (copy)"
    )


def device_name(context: Context) -> str:
    is_cuda = context.device.type == "cuda"
    return torch.cuda.get_device_name(context.device) if is_cuda else "CPU"


def bars_apply(context: Context) -> bool:
    """The bars are for the reference submission's size on one H200."""
    return context.options.size == "pr1350" and "H200" in device_name(context)


def about(context: Context, failed: list[str], seconds: float) -> dict:
    """What the figures were measured on."""
    return {
        "device": device_name(context),
        "size": context.options.size,
        "bars_apply": bars_apply(context),
        "seed": context.options.seed,
        "repeats": context.options.repeats,
        "baseline_compiled": context.compiles_baseline,
        "runtime": context.runtime.as_read(),
        "ceilings": asdict(context.ceilings),
        "commit": git_commit(),
        "versions": package_versions(),
        "seconds": seconds,
        "failed_stages": failed,
    }


if __name__ == "__main__":
    with user_errors():
        main()
