"""Benchmark of slot_eval with the config's adapters, each alone and composed in their order."""

from collections.abc import Sequence

import torch
from bench_evaluation import (
    Excerpt,
    excerpt,
    fast_run,
    slices_agree,
    slot_alone,
    window_count,
)
from context import Context, ran
from results import Agreement, Bar, Row
from timing import Side, alternate, held_bytes, warmed_up

from fairway.evaluation.adapters.lora import LoraSettings
from fairway.evaluation.settings import EvaluationSettings

SCORED_TOKENS_PER_SECOND = 13_000
"""The challenge's validation text has 62 M tokens: in 600 s, 8 GPUs score 12,917 a second each."""

LEAST_WINDOWS_PER_LANE = 6

Columns = dict[str, torch.Tensor]
"""Of slot_eval's table, by name, in the text's order."""


def adapters(context: Context) -> list[Row]:
    """The default evaluation and its parts; the baseline is the plain sliding window."""
    evaluation, cut = context.section("evaluation"), slot_alone(context, scope="window")
    listed = dict(zip(evaluation.labels, evaluation.adapters, strict=True))
    ways = {
        name: cut.changed(adapters=[listed[label] for label in labels])
        for name, labels in adapter_lists(list(listed)).items()
    }
    composed = list(ways)[-1]
    windows = window_count(context, cut, windows_per_lane(evaluation))
    text = excerpt(context, cut, windows)
    weights, device = context.trained_weights(), context.device
    held = held_bytes(device)
    # LoRA freezes the model; a compiled one would be compiled anew for that.
    model = context.model(weights).requires_grad_(False)
    found: dict[str, dict[str, Columns]] = {name: {} for name in ways}
    sides = {
        name: warmed_up(
            device,
            lambda name=name, settings=settings: fast_run(
                context, model, settings, text, found[name]
            ),
            held,
        )
        for name, settings in ways.items()
    }
    seconds = alternate(sides, context.options.repeats)
    columns = {name: one["fast"] for name, one in found.items()}
    agreements = _agreements(context, ways["none"], columns)
    return [
        _rate_row(ways[composed], text, seconds, composed, agreements, ran(model)),
        *(_time_row(name, sides, seconds, columns, ran(model)) for name in ways),
    ]


def adapter_lists(listed: Sequence[str]) -> dict[str, list[str]]:
    """What is measured, by name: no adapter, each alone, and all of them, which comes last."""
    lists = [[], *([name] for name in reversed(listed)), list(listed)]
    return {" + ".join(names) or "none": names for names in lists}


def windows_per_lane(settings: EvaluationSettings) -> int:
    """Whole chunks of LoRA, so that steps that learn have their share of the time."""
    lora = (one.settings for one in settings.adapters if isinstance(one.settings, LoraSettings))
    chunk_tokens = next(lora, LoraSettings()).chunk_tokens
    steps_per_chunk = max(1, chunk_tokens // settings.stride_tokens)
    return -(-LEAST_WINDOWS_PER_LANE // steps_per_chunk) * steps_per_chunk


def _agreements(
    context: Context, settings: EvaluationSettings, columns: dict[str, Columns]
) -> tuple[Agreement, ...]:
    """Adapters leave the loss of the model itself alone."""
    alone, stride = columns["none"]["nll_before"], settings.stride_tokens
    return tuple(
        slices_agree(context, columns[name], alone, stride, f"before {name} and without adapters")
        for name in columns
        if name != "none"
    )


def _rate_row(
    settings: EvaluationSettings,
    text: Excerpt,
    seconds: dict[str, float],
    composed: str,
    agreements: tuple[Agreement, ...],
    path: dict[str, str],
) -> Row:
    # The text's first window scores more than a stride; in a long run that counts for nothing.
    scored = text.windows * settings.stride_tokens
    rate, plain = scored / seconds[composed], scored / seconds["none"]
    return Row(
        "adapters", "scored tokens/s", rate, plain, rate / plain, **path,
        bars=(
            Bar(f">= {SCORED_TOKENS_PER_SECOND:,} tokens/s", rate >= SCORED_TOKENS_PER_SECOND),
        ),
        agreements=agreements,
        note=f"{composed}; {text.windows} windows in {settings.lanes} lanes, "
        f"{settings.stride_tokens} tokens "
        "each; baseline: the plain sliding window",
    )  # fmt: skip


def _time_row(
    name: str,
    sides: dict[str, Side],
    seconds: dict[str, float],
    columns: dict[str, Columns],
    path: dict[str, str],
) -> Row:
    found = columns[name]
    gain = float((found["nll_before"] - found["nll_after"]).mean())
    parts = {key: float(value.mean()) for key, value in found.items() if key.startswith("gain_")}
    split = ", ".join(f"{key.removeprefix('gain_')} {value:.5f}" for key, value in parts.items())
    return Row(
        "adapters", f"time over sliding alone, {name}", seconds[name] / seconds["none"],
        baseline_peak_bytes=sides["none"].peak_bytes, fast_peak_bytes=sides[name].peak_bytes,
        **path,
        note=f"gain {gain:.5f} nats a token" + (f" ({split})" if len(parts) > 1 else ""),
    )  # fmt: skip
