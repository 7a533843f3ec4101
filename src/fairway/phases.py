"""Where a process's seconds go: start, wait, read, compile, write, and work, which is the rest.

What reads, compiles or writes says so, as a decorator or around a block:

    @phase("read")
    def load_model(path): ...

Phases exclude each other: a file that is read while kernels are compiled counts as `read` alone.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

from fairway.allot import JOB_STARTED

Phase = Literal["start", "wait", "read", "compile", "work", "write"]


class PhaseClock:
    """Seconds by phase. All is `start` until `begin_work`, and then `work` between phases.

    Where threads overlap, the phase that was entered last has the time.
    """

    def __init__(self, seconds_before: float = 0.0) -> None:
        self._seconds: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._seconds["start"] = seconds_before
        self._entered: list[tuple[object, Phase]] = []
        self._between: Phase = "start"
        self._counted_until = time.perf_counter()
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the block, or each call of the function that this decorates, as `name`."""
        token = (object(), name)
        with self._lock:
            self._count()
            self._entered.append(token)
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._entered.remove(token)

    def move(self, seconds: float, to: Phase) -> None:
        """Count `seconds` of the phase that runs as `to`."""
        with self._lock:
            self._count()
            self._seconds[self._current] -= seconds
            self._seconds[to] += seconds

    def begin_work(self) -> None:
        """End `start`."""
        with self._lock:
            self._count()
            self._between = "work"

    def seconds(self) -> dict[Phase, float]:
        """Phase → seconds until now. From here on a stage that follows in this process counts."""
        with self._lock:
            self._count()
            seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
            self._between = "start"
            return seconds

    @property
    def _current(self) -> Phase:
        return self._entered[-1][1] if self._entered else self._between

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self._current] += now - self._counted_until
        self._counted_until = now


def _seconds_since_start() -> float:
    """Of the job; without the word of `fairway.allot`, it began with its process."""
    if started := os.environ.get(JOB_STARTED):
        return time.time() - float(started)
    with suppress(OSError):  # Linux only; elsewhere it begins with this import
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return 0.0


CLOCK = PhaseClock(_seconds_since_start())
"""Of this process."""
phase = CLOCK.phase
