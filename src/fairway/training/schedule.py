"""Learning-rate scale and Muon momentum as pure functions of progress."""


def learning_rate_scale(
    step: int,
    elapsed_seconds: float,
    *,
    max_steps: int,
    max_seconds: float | None,
    warmdown_steps: int,
) -> float:
    """Linear warmdown to 0 over the last `warmdown_steps` steps, or over as much *time*.

    Where the clock ends the run, the length of the warmdown in seconds is warmdown_steps times
    the mean duration of a step so far. The smaller of the two scales holds.
    """
    scale = min(1.0, (max_steps - step) / max(warmdown_steps, 1))
    if max_seconds is not None and step > 0:
        warmdown_seconds = warmdown_steps * elapsed_seconds / step
        if warmdown_seconds > 0:
            scale = min(scale, (max_seconds - elapsed_seconds) / warmdown_seconds)
    return max(scale, 0.0)


def muon_momentum(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """Linear from `start` at step 0 to `end` at `warmup_steps`, constant after."""
    fraction = min(1.0, step / max(warmup_steps, 1))
    return start + (end - start) * fraction
