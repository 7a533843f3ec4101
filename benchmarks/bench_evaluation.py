"""Benchmark of slot_eval without a delta, and what the benchmarks of SLOT share with it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from ceilings import window_flops
from context import Context, ran
from record_evaluation import record_logits, record_sliding
from results import Agreement, Bar, Row
from timing import Run, alternate, held_bytes, timed, warmed_up

from fairway.errors import UserError
from fairway.evaluation.evaluator import EvaluatorSettings, evaluator_settings
from fairway.evaluation.forward import forward_pass
from fairway.evaluation.token_table import score_rank
from fairway.model.gpt import GPT

WINDOWS_PER_LANE = 8
"""As in a long run, most fits then start warm, from the delta of the window before."""
BASELINE_BATCHES = 16


@dataclass(frozen=True)
class Excerpt:
    """The beginning of the validation text. windows: how many windows score it."""

    tokens: torch.Tensor
    windows: int


def slot_settings(
    context: Context, variant: str | None, evaluation: dict | None = None, slot: dict | None = None
) -> EvaluatorSettings:
    """As `variant` has it, but SLOT alone; with changed keys.

    The lanes are those of one forward pass: what one GPU of eight scores at the record's size.
    """
    cut = context.section("evaluation", variant)
    cut |= {"adapters": ["slot"], "lanes": min(cut["lanes"], cut["forward_windows"])}
    return evaluator_settings(
        {
            "evaluation": cut | (evaluation or {}),
            "slot": context.section("slot", variant) | (slot or {}),
            "lora": context.section("lora", variant),
            "ngram": context.section("ngram", variant),
        }
    )


def without_adapters(settings: EvaluatorSettings) -> EvaluatorSettings:
    """Sliding windows alone, the same."""
    return replace(settings, evaluation=replace(settings.evaluation, adapters=[]))


def excerpt(context: Context, settings: EvaluatorSettings, windows: int) -> Excerpt:
    """Text that `windows` full windows score without one being moved back."""
    cut = settings.evaluation
    count = cut.window_tokens + cut.stride_tokens * (windows - 1) + 1
    return Excerpt(context.stream("val", count), windows)


def window_count(
    context: Context, settings: EvaluatorSettings, per_lane: int = WINDOWS_PER_LANE
) -> int:
    """--windows, or `per_lane` for every lane, in whole batches, as far as text goes.

    With a delta for each batch a lane has several batches.
    """
    cut, batch_windows = settings.evaluation, settings.slot.batch_windows
    if settings.shares_batches:
        per_lane = BASELINE_BATCHES * batch_windows
    text = len(context.stream("val")) - 1 - cut.window_tokens
    available = 1 + text // cut.stride_tokens
    wanted = context.options.windows or cut.lanes * per_lane
    windows = min(wanted, available) // batch_windows * batch_windows
    if windows < batch_windows:
        raise UserError(
            f"the split val has room for {max(available, 0)} windows, one batch has "
            f"{batch_windows}: bring a larger dataset, or raise --windows"
        )
    return windows


def fast_scores(
    context: Context,
    logits: Callable,
    settings: EvaluatorSettings,
    text: Excerpt,
    kernels: str,
    model: GPT | None = None,
) -> dict[str, torch.Tensor]:
    """What slot_eval runs on one process: the columns of its table, in the stream's order.

    model: what LoRA adapts, where it is listed.
    """
    scores = score_rank(
        logits,
        text.tokens,
        settings,
        context.dataset.bos_id,
        0,
        1,
        advance=lambda _: None,
        kernels=kernels,
        model=model,
        seed=context.options.seed,
    )
    order = torch.from_numpy(scores.columns["position"]).argsort()
    return {name: torch.from_numpy(column)[order] for name, column in scores.columns.items()}


def sliding(context: Context) -> list[Row]:
    """Windows without a delta: the forward passes and what slot_eval does around them."""
    settings = without_adapters(slot_settings(context, None))
    cut = settings.evaluation
    text = excerpt(context, settings, window_count(context, settings))
    # The baseline is slow, and its rate is constant.
    short = excerpt(context, settings, first_batches(settings, text.windows))
    device, found = context.device, {}
    held = held_bytes(device)
    model = context.model(context.scattered_weights())
    sides = {
        "fast": warmed_up(device, lambda: fast_run(context, model, settings, text, found), held)
    }
    sides["baseline"] = warmed_up(device, lambda: _record_run(context, settings, short, found))
    seconds = alternate(sides, context.options.repeats)
    rates = {
        "fast": text.windows / seconds["fast"], "baseline": short.windows / seconds["baseline"]
    }  # fmt: skip
    flops = window_flops(model.config, cut.window_tokens, cut.stride_tokens)
    ratio = rates["fast"] / rates["baseline"]
    agreement = slices_agree(
        context, found["fast"], found["baseline"], cut.stride_tokens, "without a delta"
    )
    return [
        Row(
            "sliding", "windows/s", rates["fast"], rates["baseline"], ratio, "matmul",
            flops * rates["fast"] / context.ceilings.matmul_flops_per_second,
            **peaks(sides), **ran(model),
            bars=(Bar(">= 1.5x the baseline", ratio >= 1.5),),
            agreements=(agreement,),
            note=f"{text.windows} windows of {cut.window_tokens}, stride "
            f"{cut.stride_tokens} (baseline: the first {short.windows})",
        )
    ]  # fmt: skip


def first_batches(settings: EvaluatorSettings, windows: int) -> int:
    """How many of `windows` the baseline runs."""
    return min(windows, BASELINE_BATCHES * settings.slot.batch_windows)


def slices_agree(
    context: Context, fast: dict, theirs: torch.Tensor, stride: int, what: str
) -> Agreement:
    """The windows that both sides scored: mean loss of each scored slice before any delta."""
    signed = fast["nll_before"][: len(theirs)] - theirs
    slices = signed[: len(signed) // stride * stride].view(-1, stride).mean(1).abs()
    single = float(signed.abs().max())
    return context.losses_agree(
        f"loss of a scored slice {what}, nats (of a single target at most {single:.2g})",
        float(slices.max()),
    )


def fast_run(
    context: Context, model: GPT, settings: EvaluatorSettings, text: Excerpt, found
) -> Run:
    """Scores the excerpt as slot_eval does, and leaves the losses under `fast` in `found`."""
    logits = forward_pass(model, context.runtime)

    def score() -> None:
        found["fast"] = fast_scores(context, logits, settings, text, model.kernels, model)

    return lambda: [timed(context.device, score)]


def _record_run(context, settings, text, found) -> Run:
    model = context.baseline(context.scattered_weights())
    logits = record_logits(model, context.compiles_baseline)

    def score() -> None:
        # The record, too, keeps its losses on the device until the end.
        found["baseline"] = record_sliding(logits, text.tokens, settings).double().cpu()

    return lambda: [timed(context.device, score)]


def peaks(sides: dict) -> dict[str, int | None]:
    """The memory columns of a row."""
    return {f"{name}_peak_bytes": sides[name].peak_bytes for name in ("fast", "baseline")}
