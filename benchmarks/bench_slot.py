"""Benchmarks of slot_eval with a delta, fitted to each window alone or to overlapping windows."""

import statistics
from collections.abc import Callable

import torch
from baseline import BaselineGPT
from baseline_evaluation import baseline_logits, baseline_slot, focal_positions, slot_of
from bench_evaluation import (
    Excerpt,
    Passes,
    columns_of,
    evaluator,
    excerpt,
    fast_run,
    first_batches,
    peaks,
    slices_agree,
    slot_alone,
    window_count,
    without_adapters,
)
from ceilings import window_flops
from context import Context, ran
from results import Agreement, Bar, Row
from timing import Run, Side, Stopwatch, alternate, held_bytes, timed, warmed_up

from fairway.evaluation.forward import forward_pass
from fairway.evaluation.settings import EvaluationSettings
from fairway.model.gpt import GPT

KERNEL_TOLERANCE = 2e-3
"""Nats, mean over targets, between plain and fused fits of one problem."""

FIT_TOLERANCE = 1e-2
"""Nats of the mean loss, between two L-BFGS codes, each on its own model's logits."""

AGREEMENT_L2 = 14.0
"""Without a prior the best delta lies at infinity, and each code stops somewhere else."""

CHECKED_BATCHES = 2


def slot_window(context: Context) -> list[Row]:
    """The causal fit: time over sliding windows alone, of the same windows."""
    settings = slot_alone(context, scope="window")
    text = excerpt(context, settings, window_count(context, settings))
    weights, device, found = context.trained_weights(), context.device, {}
    held = held_bytes(device)
    model = context.model(weights)
    alone = without_adapters(settings)
    sides = {
        "alone": warmed_up(device, lambda: fast_run(context, model, alone, text, {}), held),
        "fitted": warmed_up(device, lambda: fast_run(context, model, settings, text, found), held),
    }
    seconds = alternate(sides, context.options.repeats)
    ratio = seconds["fitted"] / seconds["alone"]
    gain = float((found["fast"]["nll_before"] - found["fast"]["nll_after"]).mean())
    return [
        Row(
            "slot_window", "windows/s", text.windows / seconds["fitted"], None, None, "matmul",
            _ceiling_seconds(context, settings, text) / seconds["fitted"],
            None, sides["fitted"].peak_bytes, **ran(model),
            note=f"{text.windows} windows in {settings.lanes} lanes; the fit gains "
            f"{gain:.5f} nats",
        ),
        Row(
            "slot_window", "time over sliding alone", ratio, **ran(model),
            bars=(Bar("<= 1.15", ratio <= 1.15),),
            agreements=_window_fits_agree(context, model, settings),
            note=f"the fit's share is {1 - 1 / ratio:.1%}; the submission's ratio: row slot_batch",
        ),
    ]  # fmt: skip


def _ceiling_seconds(context: Context, settings: EvaluationSettings, text: Excerpt) -> float:
    """The forward passes at the matmul ceiling; a fit is not counted as useful operations."""
    flops = window_flops(context.model_config(), settings.window_tokens, focal_positions(settings))
    return text.windows * flops / context.ceilings.matmul_flops_per_second


def _window_fits_agree(
    context: Context, model: GPT, settings: EvaluationSettings
) -> tuple[Agreement, ...]:
    """A fit leaves the scores before its delta alone; fused fits find what plain ones find."""
    text = excerpt(context, settings, slot_of(settings).batch_windows)
    forward = forward_pass(model, context.runtime)

    def scores(settings: EvaluationSettings, kernels: str) -> dict[str, torch.Tensor]:
        return columns_of(evaluator(context, Passes(forward, kernels), settings), text)

    own, plain = scores(settings, model.kernels), scores(settings, "plain")
    alone = scores(without_adapters(settings), "plain")
    difference = float((own["nll_after"] - plain["nll_after"]).abs().mean())
    what = "with and without a fit"
    return (
        slices_agree(context, own, alone["nll_before"], settings.stride_tokens, what),
        Agreement("loss after plain and fused fits, mean, nats", difference, KERNEL_TOLERANCE),
    )


def slot_batch(context: Context) -> list[Row]:
    """One delta for overlapping windows, as the submission's code has it."""
    settings = slot_alone(context, "leaky", scope="batch", context_logits="current")
    settings = settings.changed(lanes=1)
    text = excerpt(context, settings, first_batches(settings, window_count(context, settings)))
    weights, found = context.trained_weights(), {}
    forward: dict[str, list[float]] = {"fast": [], "baseline": []}
    models, ways, sides = {}, {}, {}
    for name, make in (("fast", context.model), ("baseline", context.baseline)):
        held = held_bytes(context.device)
        models[name] = make(weights)
        ways[name] = _way(context, models[name])
        run = _measured(context, ways[name], settings, text, found, name, forward[name])
        sides[name] = warmed_up(context.device, lambda run=run: run, held)
        # The run that compiled does not count.
        del forward[name][0]
    seconds = alternate(sides, context.options.repeats)
    agreement = _batch_fits_agree(context, ways, settings)
    return _batch_rows(
        context, models["fast"], settings, text, sides, seconds, forward, found, agreement
    )


Scorer = Callable[[Callable, EvaluationSettings, Excerpt], torch.Tensor]
"""Nats of every target after the delta, float64 [n] on the CPU."""


Way = tuple[Callable, Scorer]


def _way(context: Context, model: GPT | BaselineGPT) -> Way:
    """The forward pass of either model, and what scores a text with it."""
    if isinstance(model, BaselineGPT):
        return baseline_logits(model, context.compiles_baseline), _baseline_scores

    def scores(logits: Callable, settings: EvaluationSettings, text: Excerpt) -> torch.Tensor:
        passes = Passes(logits, model.kernels)
        return columns_of(evaluator(context, passes, settings), text)["nll_after"]

    return forward_pass(model, context.runtime), scores


def _baseline_scores(logits: Callable, settings: EvaluationSettings, text: Excerpt) -> torch.Tensor:
    return baseline_slot(logits, text.tokens, settings).double().cpu()


def _measured(
    context, way: Way, settings, text, found: dict, name: str, forward: list[float]
) -> Run:
    """Seconds of scoring the excerpt; those of its forward passes are appended to `forward`."""
    watch, (logits, scorer) = Stopwatch(context.device), way
    watched = watch.wrap(logits)

    def score() -> None:
        found[name] = scorer(watched, settings, text)

    def run() -> list[float]:
        seconds = timed(context.device, score)
        forward.append(watch.take_seconds())
        return [seconds]

    return run


def _batch_fits_agree(
    context: Context, ways: dict[str, Way], settings: EvaluationSettings
) -> Agreement:
    """With a prior, so that there is one best delta to be found."""
    slot = slot_of(settings)
    prior = settings.changed(adapters=[{"slot": slot.changed(l2=AGREEMENT_L2)}])
    windows = CHECKED_BATCHES * slot.batch_windows
    text = excerpt(context, settings, min(windows, window_count(context, settings)))
    after = {name: scorer(logits, prior, text) for name, (logits, scorer) in ways.items()}
    difference = abs(float((after["fast"] - after["baseline"]).mean()))
    return Agreement(
        f"mean loss after a delta with l2 {AGREEMENT_L2:g}, nats", difference, FIT_TOLERANCE
    )


def _batch_rows(
    context, model, settings, text, sides: dict[str, Side], seconds, forward, found, agreement
) -> list[Row]:
    batch_windows = slot_of(settings).batch_windows
    batches = text.windows / batch_windows
    passes = {name: statistics.median(times) for name, times in forward.items()}
    fits = {name: seconds[name] - passes[name] for name in seconds}
    over = {name: seconds[name] / passes[name] for name in seconds}
    ratio = seconds["baseline"] / seconds["fast"]
    losses = ", ".join(f"{name} {float(found[name].mean()):.4f}" for name in ("fast", "baseline"))
    per_batch = f"of {batch_windows} windows"
    return [
        Row(
            "slot_batch", f"ms a batch {per_batch}", seconds["fast"] / batches * 1e3,
            seconds["baseline"] / batches * 1e3, ratio, "matmul",
            _ceiling_seconds(context, settings, text) / seconds["fast"],
            **peaks(sides), **ran(model),
            bars=(Bar(">= 5x the submission's way", ratio >= 5),),
            agreements=(agreement,),
            note=f"{batches:.0f} batches; mean loss after the leaking delta, nats: {losses}",
        ),
        Row(
            "slot_batch", f"ms of fitting {per_batch}", fits["fast"] / batches * 1e3,
            fits["baseline"] / batches * 1e3, fits["baseline"] / fits["fast"], **ran(model),
        ),
        Row(
            "slot_batch", "time over the forward passes alone", over["fast"], over["baseline"],
            over["baseline"] / over["fast"], **ran(model),
        ),
    ]  # fmt: skip
