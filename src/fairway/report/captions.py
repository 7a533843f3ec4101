"""A sentence under each figure: the statistic that is drawn, and what it means."""

from typing import NamedTuple

from fairway.report.format import joined
from fairway.report.results import FAIL, Results


class Caption(NamedTuple):
    """A figure's heading, what it shows in one sentence or two, and its text alternative."""

    title: str
    text: str
    alternative: str


def _audit_share(results: Results) -> float:
    seconds = {key: metrics["seconds"] for key, metrics in results.metrics.items()}
    audits = sum(spent for (_, _, stage), spent in seconds.items() if stage == "audit")
    return audits / (sum(seconds.values()) - audits)


def figure_captions(results: Results) -> dict[str, Caption]:
    """Captions by figure name."""
    seeds = f"{len(results.seeds)} seed" + ("s" if len(results.seeds) > 1 else "")
    failed = [variant for variant in results.variants if results.verdict(variant) == FAIL]
    warning = (
        f" Dashed and hollow: {joined(failed)}, which failed the audit; that score is not valid."
        if failed
        else ""
    )
    return {
        "bpb_by_stage": Caption(
            "Validation bits per byte by stage",
            f"Each point is one of {seeds}, each line the mean: a step down is what the stage "
            f"gained, the step up at GPTQ is the price of fitting the artifact.{warning}",
            "Line chart of val_bpb after each stage, one line per variant.",
        ),
        "training_curves": Caption(
            "Training curves",
            "Training loss in nats per token against tokens seen, one line per seed, over the "
            "learning-rate scale: how far the lines lie apart is how much a run depends on chance.",
            "Line chart of training loss over tokens seen, one line per seed.",
        ),
        "gain_by_position": Caption(
            "Where adaptation gains",
            f"Mean loss before minus after adaptation, in nats per token; points are {seeds}, each "
            "variant has its own scale. Left, by the tokens since the document began, in doubling "
            "bins with the number of targets in each, in all and by adapter; right, in all along "
            "the stream. An honest gain needs text to learn from, so it should be small where a "
            "document begins, and level along the stream.",
            "Line charts of the gain by position in the document, one line per adapter and one in "
            "all, and by position in the stream.",
        ),
        "leak": Caption(
            "Where the leak sits",
            "Left, the mean gain of targets that were in the loss of the very delta that scored "
            "them, against the rest: a causal method has none of the former. Right, the share of "
            "distributions that changed when a token so many positions after them was replaced: "
            "a causal method shows none at any distance, and a delta shared by a batch of windows "
            "shows the length of that batch (dotted; the first window of the text scores more).",
            "Bar chart of the gain by membership in the delta's loss, and histogram of how far "
            "back a replaced token changed distributions.",
        ),
        "budgets": Caption(
            "Budgets",
            "The most that any seed used of each limit; the upright line is the limit. The "
            "artifact counts with the code that scores it.",
            "Bar charts of artifact bytes, training seconds and evaluation seconds per variant.",
        ),
        "stage_times": Caption(
            "Stage times",
            f"Wall-clock seconds of each stage: the bar is the mean over "
            f"{seeds}, each point one seed. The audits took {_audit_share(results):.0%} of what "
            "the other stages took together.",
            "Bar chart of wall-clock seconds per stage and variant.",
        ),
    }
