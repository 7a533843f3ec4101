"""What a PASS says and what it does not, in plain words."""

from fairway.audit.flip import NOISE_MARGIN, FlipRun
from fairway.audit.flip_plan import RANDOM, TokenClasses
from fairway.audit.interface import Check


def meaning_of_pass(
    run: FlipRun | None,
    num_targets: int,
    leak_rate: float | None,
    null: Check,
    classes: TokenClasses | None,
) -> str:
    """What a reviewer may conclude from a PASS, in plain words."""
    if run is None:
        return "Nothing could be compared: the evaluator keeps state between calls."
    random_flips = [one.flip for one in run.results if one.flip.seam == RANDOM]
    compared = "distributions" if run.has_distributions else "losses, no distributions,"
    text = (
        f"{len(run.results)} replacements in an excerpt of {num_targets:,} targets, "
        f"{len(random_flips)} of them at random and the others at the seams of the geometry; "
        f"{compared} were compared "
    )
    text += (
        f"above {run.threshold_nats:.3g} nats, {NOISE_MARGIN:.0f} times the noise, "
        if run.noise_nats
        else "bit for bit, "
    )
    text += f"and what was seen of rounding may be worth {run.limit_bpb:g} bpb at most. "
    if leak_rate is not None:
        also = f", by a token of another {' or '.join(classes)} in turn" if classes else ""
        text += (
            f"A leak at {leak_rate:.1%} of all tokens or more would have been seen with 99 % "
            f"probability, if it shows whatever replaces them{also}; a rarer one is seen where it "
            "crosses a seam that was tried, and may be missed elsewhere."
        )
    if "detectable_gain_nats_per_token" in null.evidence:
        gain = null.evidence["detectable_gain_nats_per_token"]
        text += f" The null test would have shown a leak worth {gain:.4f} nats a token."
    return text
