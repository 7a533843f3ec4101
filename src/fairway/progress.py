"""Progress with rate and remaining time: a bar on a terminal, lines in a log."""

import sys

from tqdm import tqdm

LOG_INTERVAL_SECONDS = 5.0


class _LineProgress(tqdm):
    """tqdm that prints whole lines, for log files where a carriage return is noise."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        # tqdm clears a bar with an empty message.
        if msg != "":
            print(msg or str(self), file=sys.stderr, flush=True)
        return True


def progress(
    total: int | None, description: str, unit: str, *, initial: int = 0, show: bool = True
) -> tqdm:
    """A tqdm instance (use as a context manager; call `.update(n)` and `.set_postfix`).

    total: units of work in all, None where that is not known.
    unit: what is counted, such as "step" or "window".
    show=False (every rank but the first) prints nothing.
    """
    terminal = sys.stderr.isatty()
    kind = tqdm if terminal else _LineProgress
    return kind(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        disable=not show,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else LOG_INTERVAL_SECONDS,
        maxinterval=LOG_INTERVAL_SECONDS * 2,
        bar_format=None
        if terminal
        else "{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        file=sys.stderr,
    )
