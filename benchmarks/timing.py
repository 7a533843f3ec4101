"""Seconds and bytes: CUDA events on a GPU, the wall clock on a CPU, medians everywhere."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], list[float]]
"""One measurement: the seconds of each repetition that it made."""


@dataclass(frozen=True)
class Side:
    """One way of doing a stage, warmed up.

    first: the seconds of the run after the one that compiled. peak_bytes: the most GPU memory that
    it took beyond what lay there before; None on a CPU.
    """

    run: Run
    first: list[float]
    peak_bytes: int | None


def timed(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    begin, end = _event(), _event()
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def median_seconds(device: torch.device, function: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` calls, after one call that does not count."""
    function()
    return statistics.median(timed(device, function) for _ in range(repeats))


def held_bytes(device: torch.device) -> int:
    """GPU memory that live tensors hold, after what nothing needs was given back."""
    release_memory(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def warmed_up(device: torch.device, build: Callable[[], Run], held: int | None = None) -> Side:
    """Build a side and run it twice: the first run compiles, or captures what later ones replay.

    The memory is that of both, for a CUDA graph's is allocated only while it is captured.
    held: `held_bytes` before anything of this side was made; None where `build` makes it all.
    """
    held = held_bytes(device) if held is None else held
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = build()
    run()
    first = run()
    if device.type != "cuda":
        return Side(run, first, None)
    torch.cuda.synchronize(device)
    return Side(run, first, torch.cuda.max_memory_allocated(device) - held)


def median_of(side: Side, repeats: int) -> float:
    """Median seconds of `repeats` runs, the one that showed its memory among them."""
    later = (second for _ in range(repeats - 1) for second in side.run())
    return statistics.median([*side.first, *later])


def alternate(sides: Mapping[str, Side], repeats: int) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that a drift meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name] += side.run()
    return {name: statistics.median(values) for name, values in seconds.items()}


def release_memory(device: torch.device) -> None:
    """Give back what deleted models held, so that one stage's memory is not another's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Stopwatch:
    """Adds up the time of some calls inside a longer run without waiting for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, Any]] = []

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with every call's time added."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            begin = self._mark()
            result = function(*arguments, **keywords)
            self._marks.append((begin, self._mark()))
            return result

        return call

    def take_seconds(self) -> float:
        """Seconds of all calls since the last time this was asked; waits for the GPU."""
        marks, self._marks = self._marks, []
        if self._device.type != "cuda":
            return sum(end - begin for begin, end in marks)
        torch.cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in marks) / 1000

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = _event()
        event.record()
        return event


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
