"""Benchmarks of slot_eval: sliding windows alone, and SLOT in both scopes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from ceilings import window_flops
from context import Context, ran
from record_evaluation import record_logits, record_sliding, record_slot
from results import Agreement, Bar, Row
from timing import Run, Stopwatch, alternate, held_bytes, timed, warmed_up

from fairway.adaptation.slot import SlotSettings
from fairway.adaptation.token_table import score_rank
from fairway.errors import UserError
from fairway.model.gpt import GPT

WINDOWS_PER_LANE = 8
"""As in a long run, most fits then start warm, from the delta of the window before."""
BASELINE_BATCHES = 16
FIT_TOLERANCE = 0.02
"""Nats of the mean loss after a fit: two L-BFGS codes stop at different points of a flat valley."""

FitTimes = dict[str, list[float]]


@dataclass(frozen=True)
class Excerpt:
    """The beginning of the validation text. windows: how many windows score it."""

    tokens: torch.Tensor
    windows: int


def excerpt(context: Context, settings: SlotSettings, windows: int) -> Excerpt:
    """Text that `windows` full windows score without one being moved back."""
    count = settings.window_tokens + settings.stride_tokens * (windows - 1) + 1
    return Excerpt(context.stream("val", count), windows)


def window_count(context: Context, settings: SlotSettings) -> int:
    """--windows, or enough that every lane has several, in whole batches, as far as text goes."""
    text = len(context.stream("val")) - 1 - settings.window_tokens
    available = 1 + text // settings.stride_tokens
    wanted = context.options.windows or settings.lanes * WINDOWS_PER_LANE
    windows = min(wanted, available) // settings.batch_windows * settings.batch_windows
    if windows < settings.batch_windows:
        raise UserError(
            f"the split val has room for {max(available, 0)} windows, one batch has "
            f"{settings.batch_windows}: bring a larger dataset, or raise --windows"
        )
    return windows


def fast_logits(context: Context, model: GPT) -> Callable[..., torch.Tensor]:
    """The forward pass as slot_eval prepares it."""
    return torch.compile(model) if context.compiles(model) else model


def fast_scores(
    context: Context, logits: Callable, settings: SlotSettings, text: Excerpt, kernels: str
) -> dict[str, torch.Tensor]:
    """What slot_eval runs on one process: float64 nats before and after, in the stream's order."""
    scores = score_rank(
        logits,
        text.tokens,
        settings,
        context.dataset.bos_id,
        0,
        1,
        advance=lambda _: None,
        kernels=kernels,
    )
    order = torch.from_numpy(scores.columns["position"]).argsort()
    return {
        name: torch.from_numpy(scores.columns[name])[order] for name in ("nll_before", "nll_after")
    }


def sliding(context: Context) -> list[Row]:
    """Windows without a delta: the forward passes and what slot_eval does around them."""
    settings = replace(SlotSettings(**context.section("slot")), scope="none")
    text = excerpt(context, settings, window_count(context, settings))
    short = baseline_excerpt(context, settings, text)
    model, found = context.model(context.scattered_weights()), {}
    sides = {
        "fast": warmed_up(context.device, lambda: _fast_run(context, model, settings, text, found))
    }
    sides["baseline"] = warmed_up(
        context.device, lambda: _record_run(context, record_sliding, settings, short, found)
    )
    seconds = alternate(sides, context.options.repeats)
    rates = {
        "fast": text.windows / seconds["fast"], "baseline": short.windows / seconds["baseline"]
    }  # fmt: skip
    flops = window_flops(model.config, settings.window_tokens, settings.stride_tokens)
    ratio = rates["fast"] / rates["baseline"]
    return [
        Row(
            "sliding", "windows/s", rates["fast"], rates["baseline"], ratio, "matmul",
            flops * rates["fast"] / context.ceilings.matmul_flops_per_second,
            **peaks(sides), **ran(model),
            bars=(Bar(">= 1.5x the baseline", ratio >= 1.5),),
            agreements=(slices_agree(context, found, settings.stride_tokens),),
            note=f"{text.windows} windows of {settings.window_tokens}, stride "
            f"{settings.stride_tokens} (baseline: the first {short.windows})",
        )
    ]  # fmt: skip


def baseline_excerpt(context: Context, settings: SlotSettings, text: Excerpt) -> Excerpt:
    """The first batches of the same windows: the baseline is slow, and its rate is constant."""
    return excerpt(context, settings, min(text.windows, BASELINE_BATCHES * settings.batch_windows))


def slices_agree(context: Context, found: dict, stride: int) -> Agreement:
    """The windows that both sides scored: mean loss of each scored slice."""
    theirs = found["baseline"]
    difference = (found["fast"]["nll_before"][: len(theirs)] - theirs).abs()
    signed = found["fast"]["nll_before"][: len(theirs)] - theirs
    slices = signed[: len(signed) // stride * stride].view(-1, stride).mean(1).abs()
    return context.losses_agree(
        f"mean loss of a scored slice, nats (single target at most {float(difference.max()):.2g})",
        float(slices.max()),
    )


def _fast_run(context, model, settings, text, found) -> Run:
    logits = fast_logits(context, model)

    def score() -> None:
        found["fast"] = fast_scores(context, logits, settings, text, model.kernels)

    return lambda: [timed(context.device, score)]


def _record_run(context, score_function, settings, text, found) -> Run:
    model = context.baseline(context.scattered_weights())
    logits = record_logits(model, context.compiles_baseline)

    def score() -> None:
        # The record, too, keeps its losses on the device until the end.
        found["baseline"] = score_function(logits, text.tokens, settings).double().cpu()

    return lambda: [timed(context.device, score)]


def slot_window(context: Context) -> list[Row]:
    """The causal fit: time over sliding windows alone, of the same windows."""
    settings = SlotSettings(**context.section("slot", _variant(context, "causal")))
    settings = replace(settings, scope="window")
    text = excerpt(context, settings, window_count(context, settings))
    weights, found = context.trained_weights(), {}
    held = held_bytes(context.device)
    model = context.model(weights)
    alone = replace(settings, scope="none")
    sides = {
        "alone": warmed_up(
            context.device, lambda: _fast_run(context, model, alone, text, {}), held
        ),
        "fitted": warmed_up(
            context.device, lambda: _fast_run(context, model, settings, text, found)
        ),
    }
    seconds = alternate(sides, context.options.repeats)
    ratio = seconds["fitted"] / seconds["alone"]
    flops = text.windows * window_flops(
        model.config, settings.window_tokens, settings.stride_tokens
    )
    ceiling_seconds = flops / context.ceilings.matmul_flops_per_second
    gain = float((found["fast"]["nll_before"] - found["fast"]["nll_after"]).mean())
    return [
        Row(
            "slot_window", "windows/s", text.windows / seconds["fitted"], None, None, "matmul",
            ceiling_seconds / seconds["fitted"], None, sides["fitted"].peak_bytes, **ran(model),
            note=f"{text.windows} windows in {settings.lanes} lanes; the fit gains {gain:.5f} nats",
        ),
        Row(
            "slot_window", "time over sliding alone", ratio, **ran(model),
            bars=(Bar("<= 1.15", ratio <= 1.15),),
            agreements=_fit_agrees(context, model, settings),
            note=f"the fit's share is {1 - 1 / ratio:.1%}; the record's ratio: row slot_batch",
        ),
    ]  # fmt: skip


def _fit_agrees(context, model, settings) -> tuple[Agreement, ...]:
    """A fit must not change the scores without its delta; fused fits find what plain ones do."""
    text = excerpt(context, settings, settings.batch_windows)
    logits = fast_logits(context, model)
    runs = {
        kernels: fast_scores(context, logits, settings, text, kernels)
        for kernels in dict.fromkeys((model.kernels, "plain"))
    }
    alone = fast_scores(context, logits, replace(settings, scope="none"), text, "plain")
    unfitted = (runs["plain"]["nll_before"] - alone["nll_before"]).abs().mean()
    fitted = (runs["plain"]["nll_after"] - runs[model.kernels]["nll_after"]).abs().mean()
    return (
        context.losses_agree("loss of a target before the delta, mean, nats", float(unfitted)),
        Agreement("loss after plain and fused fits, mean over targets, nats", float(fitted), 1e-3),
    )


def _variant(context: Context, name: str) -> str | None:
    return name if name in context.config["variants"] else None


def slot_batch(context: Context) -> list[Row]:
    """One delta for 32 overlapping windows, as the record's code has it."""
    settings = SlotSettings(**context.section("slot", _variant(context, "published")))
    settings = replace(settings, scope="batch", lanes=1)
    windows = min(window_count(context, settings), BASELINE_BATCHES * settings.batch_windows)
    text = excerpt(context, settings, windows)
    weights, found = context.trained_weights(), {}
    held = held_bytes(context.device)
    model = context.model(weights)
    forward: FitTimes = {"fast": [], "baseline": []}
    sides = {
        "fast": warmed_up(
            context.device,
            lambda: _fast_slot(context, model, settings, text, found, forward),
            held,
        )
    }
    sides["baseline"] = warmed_up(
        context.device, lambda: _record_slot(context, settings, text, found, forward)
    )
    # The runs that warmed up compiled: they do not count.
    for times in forward.values():
        times.clear()
    seconds = alternate(sides, context.options.repeats)
    return _slot_batch_rows(context, model, settings, text, sides, seconds, forward, found)


def _fast_slot(context, model, settings, text, found, forward) -> Run:
    watch = Stopwatch(context.device)
    logits = watch.wrap(fast_logits(context, model))

    def score() -> None:
        found["fast"] = fast_scores(context, logits, settings, text, model.kernels)

    return lambda: _timed_slot(context, score, watch, forward["fast"])


def _record_slot(context, settings, text, found, forward) -> Run:
    watch = Stopwatch(context.device)
    model = context.baseline(context.trained_weights())
    logits = watch.wrap(record_logits(model, context.compiles_baseline))

    def score() -> None:
        found["baseline"] = record_slot(logits, text.tokens, settings).double().cpu()

    return lambda: _timed_slot(context, score, watch, forward["baseline"])


def _timed_slot(context, score, watch: Stopwatch, forward: list[float]) -> list[float]:
    seconds = timed(context.device, score)
    forward.append(watch.take_seconds())
    return [seconds]


def _slot_batch_rows(context, model, settings, text, sides, seconds, forward, found) -> list[Row]:
    batches = text.windows / settings.batch_windows
    passes = {name: sorted(times)[len(times) // 2] for name, times in forward.items()}
    fits = {name: seconds[name] - passes[name] for name in seconds}
    over = {name: seconds[name] / passes[name] for name in seconds}
    ratio = seconds["baseline"] / seconds["fast"]
    flops = window_flops(model.config, settings.window_tokens, settings.focal)
    ceiling_seconds = text.windows * flops / context.ceilings.matmul_flops_per_second
    difference = abs(float(found["fast"]["nll_after"].mean() - found["baseline"].mean()))
    gain = float((found["fast"]["nll_before"] - found["fast"]["nll_after"]).mean())
    per_batch = f"of {settings.batch_windows} windows"
    return [
        Row(
            "slot_batch", f"ms a batch {per_batch}", seconds["fast"] / batches * 1e3,
            seconds["baseline"] / batches * 1e3, ratio, "matmul",
            ceiling_seconds / seconds["fast"], **peaks(sides), **ran(model),
            bars=(Bar(">= 5x the record's way", ratio >= 5),),
            agreements=(Agreement("mean loss after the delta, nats", difference, FIT_TOLERANCE),),
            note=f"{batches:.0f} batches; the leaking fit seems to gain {gain:.4f} nats",
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


def peaks(sides: dict) -> dict[str, int | None]:
    """The memory columns of a row."""
    return {f"{name}_peak_bytes": sides[name].peak_bytes for name in ("fast", "baseline")}
