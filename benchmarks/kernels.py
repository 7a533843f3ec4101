"""Each kernel of the fused model by itself: its time, and its share of what the hardware allows.

    python benchmarks/kernels.py --sequences 96
    python benchmarks/kernels.py --only attention,mlp
    python benchmarks/kernels.py --size frontier --vocabulary 8192

Needs no dataset: numbers are random. The floor is that of the bytes (each input read once, each
output written once) or of the operations, whichever is longer, at the ceilings measured before.
Without a GPU it runs at a toy size in Triton's interpreter (TRITON_INTERPRET=1), which only checks
that it runs.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from ceilings import Ceilings, measure_ceilings
from context import SIZES, load_recipe, model_config, say, slot_settings
from timing import median_seconds

from fairway.distributed import resolve_device
from fairway.evaluation.adapters.fit import logit_delta_kernel
from fairway.evaluation.adapters.slot import SlotSettings
from fairway.model.attention import attend, available_backends
from fairway.model.functional import rotary_angles
from fairway.model.fused import exclusion, heads, mlp, residual
from fairway.model.fused.loss import SCORES_AT_ONCE, cross_entropy
from fairway.model.runtime import select_kernels
from fairway.model.spec import GPTConfig
from fairway.stage import user_errors

REPEATS = 20
FIT_VOCABULARY = 1024
SLOT_POSITIONS = 64
"""Of each window of a batch: with the submission's focal tokens, those that are not scored."""


@dataclass(frozen=True)
class Case:
    """moved: bytes; flops: operations of matrix products and attention."""

    name: str
    run: Callable[[], object]
    moved: int = 0
    flops: float = 0.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, help="the recipe; default: pr1350 on CUDA, quickstart on a CPU"
    )
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--sequences", type=int, help="in a pass; default: 96, or 2 on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", help="parts of names, separated by commas")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    is_cuda = device.type == "cuda"
    size = options.size or ("pr1350" if is_cuda else "quickstart")
    config = load_recipe(size).sections("causal")
    model = model_config(config["model"], config["train"], options.vocabulary)
    select_kernels("fused", model, device)
    slot = slot_settings(config["evaluation"])
    sequences = options.sequences or (96 if is_cuda else 2)
    ceilings = measure_ceilings(device, seed=0)
    rows = []
    for case in cases(model, sequences, device, slot):
        if options.only and not any(part in case.name for part in options.only.split(",")):
            continue
        rows.append(measure(case, device, ceilings, REPEATS if is_cuda else 1))
        say(f"{case.name}: {rows[-1]['ms']:.3f} ms")
    say(f"\n{sequences} sequences of {model.sequence_tokens} tokens, {device.type}; {ceilings}\n")
    say(pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))


def measure(case: Case, device: torch.device, ceilings: Ceilings, repeats: int) -> dict:
    seconds = median_seconds(device, case.run, repeats)
    floor = max(
        case.moved / ceilings.memory_bytes_per_second,
        case.flops / ceilings.matmul_flops_per_second,
    )
    return {"kernel": case.name, "ms": seconds * 1e3, "of floor": floor / seconds}


def cases(
    config: GPTConfig, sequences: int, device: torch.device, slot: SlotSettings
) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = partial(torch.randn, device=device, dtype=dtype)
    rows = sequences * config.sequence_tokens
    yield from _residual_cases(config, rows, random)
    yield from _head_cases(config, rows, random)
    yield from _mlp_cases(config, rows, random)
    yield from _attention_cases(config, sequences, random, device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    for cap in (config.logit_softcap, torch.full((2,), config.logit_softcap, device=device)):
        scores = random(min(rows, SCORES_AT_ONCE // config.vocab_size), config.vocab_size)
        yield Case(
            f"loss and its gradient{'' if isinstance(cap, float) else ', two caps'}",
            lambda scores=scores, cap=cap: cross_entropy(scores, targets, cap),
            moved(scores, scores),
        )
    yield from _fit_cases(config, device, slot)


def moved(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _residual_cases(config, rows, random) -> Iterator[Case]:
    x, x0, skip, gradient, total = (random(rows, config.width) for _ in range(5))
    mix, weights = random(2, config.width).float(), random(2, config.width).float()
    yield Case("norm", lambda: residual.rms_norm(x), moved(x, x))
    normed, inverse = residual.rms_norm(x)
    mix_sums, skip_sums = residual.channel_sums(x, 2)
    yield Case(
        "norm, backward",
        lambda: residual.rms_norm_backward(gradient, normed, inverse, x),
        moved(gradient, normed, x, x),
    )
    kinds = {"": None, " with skip": weights[:1], " with gated skip": weights}
    for kind, own_weights in kinds.items():
        own = None if own_weights is None else skip
        skipped, outer = [own] if kind else [], [x] if kind == " with gated skip" else []
        yield Case(
            f"mix and norm{kind}",
            lambda own=own, weights=own_weights: residual.mix_and_norm(x, x0, mix, own, weights),
            moved(x, x0, *skipped, x, x),
        )
        yield Case(
            f"mix and norm{kind}, backward",
            lambda own=own, weights=own_weights: residual.mix_and_norm_backward(
                x, gradient, inverse, x, x0, mix, own, weights, None, None, total, mix_sums,
                skip_sums,
            ),
            moved(x, gradient, x, x0, *skipped, total, total, x, *outer),
        )  # fmt: skip


def _head_cases(config, rows, random) -> Iterator[Case]:
    H, K, D = config.heads, config.kv_heads, config.head_width
    qkv, queries = random(rows, (H + 2 * K) * D), random(rows, H, D)
    values, other = (random(rows, K, D) for _ in range(2))
    gain = random(H).float()
    positions = torch.arange(config.sequence_tokens, device=qkv.device)
    cos, sin = rotary_angles(config, positions)
    strided = qkv[:, : H * D].unflatten(1, (H, D))
    (sums,) = heads.gain_sums(qkv, H, 1)
    yield Case(
        "queries' norm and rotation",
        lambda: heads.norm_and_rotate(strided, cos, sin, gain, len(positions)),
        moved(queries, queries),
    )
    for kind, copies in {"": 1, " of copied keys": H // K}.items():
        key, value = (random(rows, K * copies, D) for _ in range(2))
        yield Case(
            f"heads{kind}, backward",
            lambda key=key, value=value: heads.heads_backward(
                queries, key, value, other, qkv, cos, sin, gain, sums
            ),
            moved(queries, key, value, other, qkv, qkv),
        )
    x = random(rows, config.width)
    gate = exclusion.HeadGate(x, random(H, 12).float())
    for kind, own in {"": None, " and gate": gate}.items():
        yield Case(
            f"exclusion{kind}",
            lambda own=own: exclusion.exclude_self(queries, values, own),
            moved(queries, values, queries),
        )
        yield Case(
            f"exclusion{kind}, backward",
            lambda own=own: exclusion.exclude_self_backward(queries, queries, values, own),
            moved(queries, queries, values, queries, values),
        )
    of_gate = random(rows, H).float()
    yield Case(
        "the gates' own gradients",
        lambda: exclusion.head_gate_backward(of_gate, gate, x),
        moved(of_gate, *3 * [x[:, :16]]),  # sectors of 32 bytes
    )


def _mlp_cases(config, rows, random) -> Iterator[Case]:
    x, up = random(rows, config.width), random(config.mlp_width, config.width)
    down = random(config.width, config.mlp_width)
    slope = config.activation_slope
    activation = mlp.mlp_up(x, up, slope)
    of_up = {"flops": 2.0 * rows * up.numel(), "moved": moved(x, up, activation)}
    yield Case("mlp: the bare product up", lambda: x @ up.T, **of_up)
    yield Case("mlp: up and activation", lambda: mlp.mlp_up(x, up, slope), **of_up)
    yield Case("mlp: the same in evaluation", lambda: mlp.mlp_up(x, up, slope, False), **of_up)
    yield Case("mlp: the bare product of the gradient", lambda: x @ down, **of_up)
    yield Case(
        "mlp: gradient and activation's",
        lambda: mlp.mlp_down_backward(x, down, activation, slope),
        flops=of_up["flops"],
        moved=moved(x, down, activation, activation),
    )


def _attention_cases(config, sequences, random, device) -> Iterator[Case]:
    T, D = config.sequence_tokens, config.head_width
    queries = random(sequences, T, config.heads, D)
    keys, values = (random(sequences, T, config.kv_heads, D) for _ in range(2))
    inputs = [part.requires_grad_() for part in (queries, keys, values)]
    flops = 2.0 * queries.numel() * T  # two products, of which the causal half counts
    for backend in available_backends(device):

        def forward(backend=backend):
            with torch.no_grad():
                return attend(*inputs, backend)

        def both(backend=backend, deterministic=False):
            output = attend(*inputs, backend, deterministic)
            return torch.autograd.grad(output, inputs, queries.detach())

        def last(backend=backend):
            with torch.no_grad():
                return attend(queries[:, -64:], keys, values, backend)

        yield Case(f"attention, {backend}: forward", forward, flops=flops)
        yield Case(f"attention, {backend}: forward and backward", both, flops=3.5 * flops)
        yield Case(
            f"attention, {backend}: the same, deterministic",
            partial(both, deterministic=True),
            flops=3.5 * flops,
        )
        yield Case(f"attention, {backend}: the last 64 positions", last, moved(keys, values))


def _fit_cases(config, device, slot) -> Iterator[Case]:
    options = {key: getattr(slot, key) for key in ("l2", "clamp", "iterations", "history")}
    small = device.type == "cpu"
    for name, rows, positions in (
        ("slot: one fit of 32 windows", 1, 32 * SLOT_POSITIONS),
        ("slot: 128 fits of a window", 128, config.sequence_tokens - 64),
    ):
        rows, positions = (1, 16) if small else (rows, positions)
        logits = 2.5 * torch.randn(rows, positions, FIT_VOCABULARY, device=device)
        probabilities = logit_delta_kernel.compact_softmax(logits)
        targets = torch.randint(0, FIT_VOCABULARY, (rows, positions), device=device)
        counted, start = (
            torch.ones_like(targets, dtype=torch.bool),
            logits.new_zeros(rows, FIT_VOCABULARY),
        )
        yield Case(
            name,
            lambda data=(probabilities, targets, counted, start): logit_delta_kernel.fit_delta(
                *data, **options
            ),
            moved(probabilities),
        )


if __name__ == "__main__":
    with user_errors():
        main()
