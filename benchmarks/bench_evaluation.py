"""Benchmark of slot_eval without a delta, and what the benchmarks of SLOT share with it."""

from dataclasses import dataclass

import torch
from baseline_evaluation import baseline_logits, baseline_sliding, slot_of
from ceilings import window_flops
from context import Context, ran, slot_settings
from results import Agreement, Bar, Row, ratio_of
from timing import Run, alternate, held_bytes, timed, warmed_up

from fairway.errors import UserError
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.text import Forward, LanguageModel
from fairway.model.gpt import GPT

WINDOWS_PER_LANE = 8
"""As in a long run, most fits then start warm, from the delta of the window before."""
BASELINE_BATCHES = 16


@dataclass(frozen=True)
class Excerpt:
    """The beginning of the validation text. windows: how many windows score it."""

    tokens: torch.Tensor
    windows: int


@dataclass(frozen=True)
class Passes:
    """A forward pass as the model of an evaluation. kernels: how fits are computed, as of a GPT."""

    forward: Forward
    kernels: str

    def __call__(self, tokens: torch.Tensor, first_position: int) -> torch.Tensor:
        return self.forward(tokens, first_position)


def slot_alone(context: Context, variant: str = "causal", **changes) -> EvaluationSettings:
    """The windows of `variant`, with SLOT alone; changes: keys of SLOT.

    The lanes are those of one forward pass: what one GPU of eight scores at the submission's size.
    """
    settings = context.section("evaluation", variant)
    slot = slot_settings(settings).changed(**changes)
    lanes = min(settings.lanes, settings.forward_windows)
    return settings.changed(adapters=[{"slot": slot}], lanes=lanes)


def without_adapters(settings: EvaluationSettings) -> EvaluationSettings:
    """Sliding windows alone, the same."""
    return settings.changed(adapters=[])


def excerpt(context: Context, settings: EvaluationSettings, windows: int) -> Excerpt:
    """Text that `windows` full windows score without one being moved back."""
    count = settings.window_tokens + settings.stride_tokens * (windows - 1) + 1
    return Excerpt(context.stream("val", count), windows)


def window_count(
    context: Context, settings: EvaluationSettings, per_lane: int = WINDOWS_PER_LANE
) -> int:
    """--windows, or `per_lane` for every lane, in whole batches of SLOT, as far as text goes.

    With a delta for each batch a lane has several batches.
    """
    batch_windows = slot_of(settings).batch_windows
    if settings.windows_scored_together is not None:
        per_lane = BASELINE_BATCHES * batch_windows
    text = len(context.stream("val")) - 1 - settings.window_tokens
    available = 1 + text // settings.stride_tokens
    wanted = context.options.windows or settings.lanes * per_lane
    windows = min(wanted, available) // batch_windows * batch_windows
    if windows < batch_windows:
        raise UserError(
            f"the split val has room for {max(available, 0)} windows, one batch has "
            f"{batch_windows}: bring a larger dataset, or raise --windows"
        )
    return windows


def evaluator(context: Context, model: LanguageModel, settings: EvaluationSettings) -> Evaluator:
    """As slot_eval makes it; a model that is a forward pass already is launched as it is."""
    runtime = context.runtime if isinstance(model, GPT) else None
    bos_id, seed = context.dataset.bos_id, context.options.seed
    return Evaluator(model, settings, bos_id=bos_id, seed=seed, runtime=runtime)


def columns_of(evaluator: Evaluator, text: Excerpt) -> dict[str, torch.Tensor]:
    """What slot_eval runs on one process: the columns of its table, in the text's order."""
    scores = evaluator.score_rank(text.tokens)
    order = torch.from_numpy(scores.columns["position"]).argsort()
    return {name: torch.from_numpy(column)[order] for name, column in scores.columns.items()}


def sliding(context: Context) -> list[Row]:
    """Windows without a delta: the forward passes and what slot_eval does around them."""
    settings = slot_alone(context)
    alone = without_adapters(settings)
    text = excerpt(context, settings, window_count(context, settings))
    # The baseline is slow, and its rate is constant.
    short = excerpt(context, settings, first_batches(settings, text.windows))
    device, found = context.device, {}
    held = held_bytes(device)
    model = context.model(context.scattered_weights())
    sides = {"fast": warmed_up(device, lambda: fast_run(context, model, alone, text, found), held)}
    if context.has_baseline:
        sides["baseline"] = warmed_up(
            device, lambda: _baseline_run(context, settings, short, found)
        )
    else:
        found["baseline"] = _plain_losses(context, alone, short)
    seconds = alternate(sides, context.options.repeats)
    windows = {"fast": text.windows, "baseline": short.windows}
    rates = {name: windows[name] / value for name, value in seconds.items()}
    flops = window_flops(model.config, settings.window_tokens, settings.stride_tokens)
    ratio = ratio_of(rates)
    agreement = slices_agree(
        context, found["fast"], found["baseline"], settings.stride_tokens, "without a delta"
    )
    return [
        Row(
            "sliding", "windows/s", rates["fast"], rates.get("baseline"), ratio, "matmul",
            flops * rates["fast"] / context.ceilings.matmul_flops_per_second,
            **peaks(sides), **ran(model),
            bars=(Bar(">= 1.5x the baseline", ratio is not None and ratio >= 1.5),),
            agreements=(agreement,),
            note=f"{text.windows} windows of {settings.window_tokens}, stride "
            f"{settings.stride_tokens} (baseline: the first {short.windows})",
        )
    ]  # fmt: skip


def first_batches(settings: EvaluationSettings, windows: int) -> int:
    """How many of `windows` the baseline runs."""
    return min(windows, BASELINE_BATCHES * slot_of(settings).batch_windows)


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
    context: Context, model: GPT, settings: EvaluationSettings, text: Excerpt, found
) -> Run:
    """Scores the excerpt as slot_eval does, and leaves the losses under `fast` in `found`."""
    scoring = evaluator(context, model, settings)

    def score() -> None:
        found["fast"] = columns_of(scoring, text)

    return lambda: [timed(context.device, score)]


def _baseline_run(context, settings, text, found) -> Run:
    model = context.baseline(context.scattered_weights())
    logits = baseline_logits(model, context.compiles_baseline)

    def score() -> None:
        # The submission, too, keeps its losses on the device until the end.
        found["baseline"] = baseline_sliding(logits, text.tokens, settings).double().cpu()

    return lambda: [timed(context.device, score)]


def _plain_losses(context: Context, settings: EvaluationSettings, text: Excerpt) -> torch.Tensor:
    """Of the plain formulation, not compiled."""
    model = Passes(context.plain(context.scattered_weights()), "plain")
    return columns_of(evaluator(context, model, settings), text)["nll_before"]


def peaks(sides: dict) -> dict[str, int | None]:
    """The memory columns of a row."""
    return {f"{name}_peak_bytes": side.peak_bytes for name, side in sides.items()}
