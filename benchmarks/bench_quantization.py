"""Benchmarks of the gptq stage: self-generated calibration text, Hessians, GPTQ, the artifact."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from baseline_evaluation import baseline_logits, baseline_next_tokens
from baseline_quantization import (
    baseline_archive,
    baseline_gptq,
    baseline_hessians,
    output_error,
)
from ceilings import generation_bytes, gptq_flops, hessian_flops
from context import Context, ran
from results import Agreement, Bar, Row
from timing import alternate, held_bytes, median_of, median_seconds, timed, warmed_up

from fairway.files import write_bytes
from fairway.model.gpt import GPT
from fairway.model.sampling import self_generated_tokens
from fairway.quantization.artifact import (
    encode_artifact,
    quantizable,
    read_artifact,
    restored,
    storable,
)
from fairway.quantization.calibration import (
    collect_hessians,
    collect_sensitivities,
    training_tokens,
)
from fairway.quantization.integers import QuantizedTensor, round_to_nearest
from fairway.quantization.quantizers.gptq import BITS, bank_codes, prepared_bank
from fairway.quantization.settings import QuantizationSettings, quantizer_of

PREFIX_LENGTHS = 8
CHECKED_TOKENS = 64
HESSIAN_SEQUENCES = 16
TIMED_MATRICES = 2
"""Of each shape: the submission's way on the CPU takes too long for all of them."""
COLLECTED_TOLERANCE = {"bfloat16": 0.05, "float16": 0.05, "float32": 1e-4}
"""Of the norm of a difference over the norm: the two formulations round activations differently."""
ERROR_SLACK = 0.02
"""The fast path chooses a clip per row, the submission per matrix, so it should never be worse."""


def self_generation(context: Context) -> list[Row]:
    """Sampling calibration sequences from the model itself."""
    settings = context.section("gptq")
    device = context.device
    held = held_bytes(device)
    model = context.model(context.scattered_weights())
    found: dict[str, torch.Tensor] = {}

    def generate() -> None:
        found["tokens"] = self_generated_tokens(
            model,
            settings.calibration_sequences,
            settings.calibration_tokens,
            settings.temperature,
            settings.batch_sequences,
            context.options.seed,
            context.dataset.bos_id,
        )

    side = warmed_up(device, lambda: lambda: [timed(device, generate)], held)
    seconds = median_of(side, context.options.repeats)
    baseline_seconds, lengths = _generation_without_cache(context, settings, found["tokens"])
    moved = generation_bytes(
        model.config,
        settings.calibration_sequences,
        settings.calibration_tokens,
        number_bytes=model.compute_dtype.itemsize,
    )
    floor = moved / context.ceilings.memory_bytes_per_second
    return [
        Row(
            "self_generation",
            f"s for {settings.calibration_sequences} x {settings.calibration_tokens} tokens",
            seconds, baseline_seconds, baseline_seconds / seconds, "memory", floor / seconds,
            None, side.peak_bytes, **ran(model),
            bars=(Bar("<= 8 s", seconds <= 8),),
            agreements=(_decoding_agrees(context, model, found["tokens"]),),
            note="the baseline is extrapolated from one step at each of the prefix lengths "
            + ", ".join(map(str, lengths)),
        )
    ]  # fmt: skip


def _generation_without_cache(
    context: Context, settings: QuantizationSettings, tokens: torch.Tensor
) -> tuple[float, list[int]]:
    """Seconds of every step, by the trapezoid rule between the prefix lengths that are timed."""
    model = context.baseline(context.scattered_weights())
    tokens = tokens.to(context.device)
    generator = torch.Generator(context.device).manual_seed(context.options.seed)
    last = settings.calibration_tokens - 1
    lengths = sorted({int(length) for length in torch.linspace(1, last, PREFIX_LENGTHS).round()})
    seconds = [
        median_seconds(
            context.device,
            lambda length=length: baseline_next_tokens(
                model, tokens[:, :length], settings.temperature, generator
            ),
            context.options.repeats,
        )
        for length in lengths
    ]
    steps = torch.trapezoid(torch.tensor(seconds), torch.tensor(lengths, dtype=torch.float32))
    # The rule counts half a step at either end.
    return float(steps) + (seconds[0] + seconds[-1]) / 2, lengths


@torch.no_grad()
def _decoding_agrees(context: Context, model: GPT, tokens: torch.Tensor) -> Agreement:
    """Nats of the same sampled text: step by step with the cache, and in one pass without."""
    tokens = tokens[:, : CHECKED_TOKENS + 1].to(context.device)
    cache = model.new_cache(len(tokens), tokens.shape[1])
    steps = [model.decode_step(column, cache) for column in tokens[:, :-1].T]
    baseline = context.baseline(context.scattered_weights())
    whole = baseline_logits(baseline, compile_model=False)(tokens[:, :-1])
    nats = [
        -torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None]).squeeze(2).mean(1)
        for logits in (torch.stack(steps, dim=1), whole)
    ]
    return context.losses_agree(
        f"mean loss of a sequence's first {tokens.shape[1] - 1} tokens, nats",
        float((nats[0] - nats[1]).abs().max()),
    )


def hessians(context: Context) -> list[Row]:
    """What quantizers learn from calibration text, against the plain formulation's."""
    settings = context.section("gptq")
    floor = (
        hessian_flops(
            context.model_config(), settings.calibration_sequences, settings.calibration_tokens
        )
        / context.ceilings.matmul_flops_per_second
    )
    rows = [_collected(context, "hessians", baseline_hessians, collect_hessians, floor)]
    if quantizer_of(settings).needs_sensitivities:
        ways = (collect_sensitivities, collect_sensitivities)
        rows.append(_collected(context, "sensitivities", *ways))
    return rows


def _collected(
    context: Context,
    what: str,
    baseline: Callable,
    fast: Callable,
    floor_seconds: float | None = None,
) -> Row:
    """baseline, fast: of a model, tokens and sequences at a time; (bank, matrix) → a tensor."""
    settings = context.section("gptq")
    device, weights = context.device, context.scattered_weights()
    sequences, length = settings.calibration_sequences, settings.calibration_tokens
    tokens = training_tokens(context.dataset, sequences, length, context.options.seed)
    models = {"baseline": context.plain(weights), "fast": context.model(weights)}
    found, coldest, sides = {}, {}, {}
    for name, collect in (("baseline", baseline), ("fast", fast)):

        def run(name=name, collect=collect) -> None:
            found[name] = collect(models[name], tokens, settings.batch_sequences)

        coldest[name] = timed(device, run)
        sides[name] = warmed_up(device, lambda run=run: lambda: [timed(device, run)])
    seconds = alternate(sides, context.options.repeats)
    differences = [
        float((found["fast"][key] - expected).norm() / expected.norm())
        for key, expected in found["baseline"].items()
    ]
    agreement = Agreement(
        f"norm of the difference in {what} over the norm, worst matrix",
        max(differences),
        COLLECTED_TOLERANCE[context.precision],
    )
    return Row(
        "hessians", f"s for {what} over {sequences} x {length} tokens",
        seconds["fast"], seconds["baseline"], seconds["baseline"] / seconds["fast"],
        floor_seconds and "matmul", floor_seconds and floor_seconds / seconds["fast"],
        sides["baseline"].peak_bytes, sides["fast"].peak_bytes,
        **ran(models["fast"]),
        bars=(Bar("<= 1 s", seconds["fast"] <= 1),),
        agreements=(agreement,),
        note=f"the first time, with compilation, the baseline took {coldest['baseline']:.2f} s, "
        f"and then the fast way {coldest['fast']:.2f} s",
    )  # fmt: skip


def gptq(context: Context) -> list[Row]:
    """Every bank with all clip candidates, the Hessians given."""
    settings = context.section("gptq")
    device = context.device
    held = held_bytes(device)
    model = context.model(context.scattered_weights())
    sequences = min(HESSIAN_SEQUENCES, settings.calibration_sequences)
    tokens = training_tokens(
        context.dataset, sequences, settings.calibration_tokens, context.options.seed
    )
    hessians = collect_hessians(model, tokens, min(sequences, settings.batch_sequences))
    banks = quantizable(model)
    quantizer = quantizer_of(settings)
    side = warmed_up(
        device,
        lambda: lambda: [timed(device, lambda: quantizer.quantize(banks, hessians))],
        held,
    )
    seconds = median_of(side, context.options.repeats)
    baseline_seconds, worst = _gptq_on_cpu(context, banks, hessians, settings)
    flops = gptq_flops(model.config, len(settings.clip_percentiles))
    ceiling_seconds = flops / context.ceilings.matmul_flops_per_second
    ratio = baseline_seconds / seconds
    return [
        Row(
            "gptq", "s, Hessians given", seconds, baseline_seconds, ratio, "matmul",
            ceiling_seconds / seconds, None, side.peak_bytes, **ran(model),
            bars=(Bar("<= 8 s", seconds <= 8), Bar(">= 10x the CPU way", ratio >= 10)),
            agreements=(Agreement("output error over the baseline's, less 1", worst, ERROR_SLACK),),
            note=f"{len(settings.clip_percentiles)} clip candidates; the baseline is extrapolated "
            f"from {TIMED_MATRICES} matrices of each bank on {torch.get_num_threads()} CPU "
            "threads; Fairway computes in float32 and float64, the ceiling is of "
            f"{context.ceilings.matmul_dtype}",
        )
    ]  # fmt: skip


def _gptq_on_cpu(context, banks, hessians, settings) -> tuple[float, float]:
    """Seconds for all matrices the submission's way; the fast way's worst error over its own."""
    total, worst = 0.0, -1.0
    for name, bank in banks.items():
        count = min(TIMED_MATRICES, len(bank))
        stack = torch.stack([hessians[name, index] for index in range(count)])
        prepared = prepared_bank(name, bank[:count], stack, settings)
        fast, _ = bank_codes(prepared, settings, settings.scale_factor)
        seconds = []
        for index in range(count):
            weights, hessian = bank[index].cpu(), stack[index].cpu()
            results = []
            seconds.append(
                timed(
                    torch.device("cpu"),
                    lambda w=weights, h=hessian, out=results: out.append(
                        baseline_gptq(
                            w,
                            h,
                            settings.clip_percentiles,
                            settings.block_columns,
                            settings.dampening_fraction,
                        )
                    ),
                )
            )
            theirs = QuantizedTensor(*results[0], BITS).dequantize()
            ours = fast.dequantize()[index].cpu()
            errors = [output_error(weights - q, hessian.float()) for q in (ours, theirs)]
            worst = max(worst, errors[0] / errors[1] - 1)
        total += len(bank) * statistics.mean(seconds)
    return total, worst


def artifact(context: Context) -> list[Row]:
    """Compressing and writing the file, and its size."""
    model = context.model(context.trained_weights())
    banks = {name: round_to_nearest(bank, BITS) for name, bank in quantizable(model).items()}
    tensors = storable(model, banks)
    cpu, sizes = torch.device("cpu"), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.bin"

        def write() -> None:
            data = encode_artifact(model.config, tensors)
            write_bytes(path, data)
            sizes["fast"] = len(data)

        def compress() -> None:
            sizes["baseline"] = len(baseline_archive(tensors))

        seconds = {name: timed(cpu, run) for name, run in (("fast", write), ("baseline", compress))}
        _, state = read_artifact(path)
    expected = restored(tensors)
    difference = max(float((state[name] - expected[name]).abs().max()) for name in expected)
    return [
        Row(
            "artifact", "s to compress and write", seconds["fast"], seconds["baseline"],
            seconds["baseline"] / seconds["fast"], **ran(model),
            bars=(Bar("<= 15 s", seconds["fast"] <= 15),),
            agreements=(Agreement("weights read back", difference, 0.0),),
            note="on the CPU; banks rounded to nearest int6",
        ),
        Row(
            "artifact", "bytes", sizes["fast"], sizes["baseline"],
            sizes["baseline"] / sizes["fast"], **ran(model),
            bars=(Bar("<= LZMA preset 9", sizes["fast"] <= sizes["baseline"]),),
            note="the baseline: LZMA preset 9 of one byte a code and all other numbers",
        ),
    ]  # fmt: skip
