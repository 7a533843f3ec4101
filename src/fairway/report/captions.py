"""What stands under each figure, and in its place where it cannot be seen."""

from collections.abc import Sequence
from typing import NamedTuple

from fairway.report.format import bits, count, joined, plural
from fairway.report.results import Results
from fairway.report.tables import furthest_change, reach_counts
from fairway.stages import chain


class Caption(NamedTuple):
    """A figure's heading, the statistic that it shows and what that means, its text alternative."""

    title: str
    text: str
    alternative: str


def captions(results: Results) -> dict[str, Caption]:
    """Captions by figure name."""
    seeds = plural(len(results.seeds), "seed")
    failed = [variant for variant in results.variants if results.failed(variant)]
    warning = (
        f" Dashed and hollow: {joined(failed)}, which failed the audit; that score is not valid."
        if failed
        else ""
    )
    stages = [f"{stage} {_seconds(results, [stage]):,.0f} s" for stage in results.stages]
    audits = _seconds(results, ["audit"])
    others = _seconds(results, [stage.name for stage in chain("report") if stage.name != "audit"])
    one_training = len({results.folder(variant, "train") for variant in results.variants}) == 1
    if results.has_few_variants:
        panels = (
            "Each variant has its own scale. First by the tokens since the document began, in "
            "doubling bins with the number of targets in each, in all and by adapter; then in all "
            "along the text."
        )
    else:
        panels = (
            "Variants that failed the audit have a scale of their own. First by the tokens since "
            "the document began, in doubling bins with the number of targets in each; then along "
            "the text. gains.parquet splits them by adapter."
        )
    return {
        "bpb_by_stage": Caption(
            "Validation bits per byte by stage",
            f"Each point is one of {seeds}, each line the mean; in the color of the text where "
            "variants share a stage. A step down is what the stage gained; the step up at gptq is "
            f"the price of fitting the artifact.{warning}",
            "Line chart of val_bpb after each stage, one line per variant. "
            "The table under Stages has its numbers.",
        ),
        "training_curves": Caption(
            "Training curves",
            "Training loss in nats per token against tokens seen, over the learning-rate scale. "
            + (
                "One line per seed; the distance between them is what chance does to a run."
                if one_training
                else "One color per training run's settings, one line per seed."
            ),
            "Line chart of training loss over tokens seen, one line per training run and seed. "
            f"The last step has a loss of {_last_losses(results)}.",
        ),
        "layers": Caption(
            "What quantization does to each matrix",
            "Above, the quantizer’s error of each matrix (dashes: rounding to the nearest), on a "
            f"logarithmic scale; below, the bits of a code. Lines are means over {seeds}; between "
            "two upright lines lies a bank of matrices, from the first layer to the last.",
            "Line charts of error and bits a code by matrix, one line per quantization. The table "
            "above has the means of each bank.",
        ),
        "gain_by_position": Caption(
            "Where adaptation gains",
            f"Mean loss before minus after adaptation, in nats per token; points are {seeds}. "
            f"{panels} An honest gain needs text to learn from, so it should be small where a "
            "document begins, and level along the text.",
            "Line charts of the gain by position in the document and by position in the text. "
            "gains.parquet has the numbers.",
        ),
        "leak": Caption(
            "Where a leak sits",
            "Above, the mean gain of targets that were in the loss of the delta that scored them, "
            "and of the rest: a causal method has none of the former. Below, the share of "
            "distributions that changed when a token so many positions after them was replaced. A "
            "causal method shows none at any distance; a delta shared by a batch of windows shows "
            "the length of that batch (dotted; the first window of the text scores more).",
            "Bar chart of the gain by membership in the delta's loss, with numbers in the table "
            "below; and how far back a replaced token changed distributions: "
            f"{_furthest(results)}.",
        ),
        "budgets": Caption(
            "Budgets",
            "The most that any seed used of each limit; the upright line is the limit. The "
            "artifact counts with the code that scores it.",
            "Bar charts of artifact bytes, training seconds and evaluation seconds per variant. "
            "The table has the numbers.",
        ),
        "stage_times": Caption(
            "Stage times",
            f"Wall-clock seconds of each stage: the bar is the mean over {seeds}, each point one "
            f"seed. A stage that variants share ran once. The audits took {audits / others:.0%} of "
            "what the other stages took together.",
            f"Bar chart of wall-clock seconds per stage and variant: {joined(stages)}.",
        ),
    }


def _last_losses(results: Results) -> str:
    runs = dict.fromkeys(results.sharers(variant, "train") for variant in results.variants)
    told = []
    for sharers in runs:
        losses = [results.curves[sharers[0], seed]["loss"].iloc[-1] for seed in results.seeds]
        told.append(f"{bits(sum(losses) / len(losses))} ({results.name_of(sharers, 'train')})")
    return joined(told)


def _furthest(results: Results) -> str:
    reach = {v: furthest_change(reach_counts(results, v)) for v in results.variants}
    return joined(f"{variant} {count(tokens)} tokens" for variant, tokens in reach.items())


def _seconds(results: Results, stages: Sequence[str]) -> float:
    """What these stages took in all, each of their runs counted once."""
    return sum(
        results.metrics[sharers[0], seed, stage]["seconds"]
        for sharers, shared in results.stages_by_sharers().items()
        for stage in shared
        for seed in results.seeds
        if stage in stages
    )
