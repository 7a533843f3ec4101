"""What a step does, as pure functions of the progress that a checkpoint holds."""

from collections.abc import Sequence


def training_progress(
    step: int, elapsed_seconds: float, *, max_steps: int, max_seconds: float | None
) -> float:
    """Share of the budget that is used up, 0 to 1: of the steps or of the time, if that is more."""
    shares = [step / max_steps, elapsed_seconds / max_seconds if max_seconds else 0.0]
    return min(1.0, max(shares))


def learning_rate_scale(
    step: int,
    elapsed_seconds: float,
    *,
    max_steps: int,
    max_seconds: float | None,
    warmdown_steps: int | None,
    warmdown_fraction: float | None = None,
    minimum: float = 0.0,
) -> float:
    """1, and at the end a linear fall towards 0, no further than to `minimum`.

    The fall takes `warmdown_fraction` of the budget. Where that is None, it takes `warmdown_steps`
    steps, or as much *time*: where the clock ends the run, its length in seconds is warmdown_steps
    times the mean duration of a step so far, and the smaller of the two scales holds.
    """
    if warmdown_fraction is not None:
        progress = training_progress(
            step, elapsed_seconds, max_steps=max_steps, max_seconds=max_seconds
        )
        return max(minimum, min(1.0, (1 - progress) / warmdown_fraction))
    assert warmdown_steps is not None
    scale = min(1.0, (max_steps - step) / max(warmdown_steps, 1))
    if max_seconds is not None and step > 0:
        warmdown_seconds = warmdown_steps * elapsed_seconds / step
        if warmdown_seconds > 0:
            scale = min(scale, (max_seconds - elapsed_seconds) / warmdown_seconds)
    return max(scale, minimum)


def sequence_length(
    progress: float, schedule: Sequence[tuple[float, int]], sequence_tokens: int
) -> int:
    """The length of the first entry (until, tokens) whose end is not reached; else the whole."""
    lengths = [tokens for until, tokens in schedule if progress < until]
    return lengths[0] if lengths else sequence_tokens


def muon_momentum(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """Linear from `start` at step 0 to `end` at `warmup_steps`, constant after."""
    fraction = min(1.0, step / max(warmup_steps, 1))
    return start + (end - start) * fraction
