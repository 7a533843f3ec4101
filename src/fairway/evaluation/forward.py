"""The evaluation's forward pass: compiled, replayed as CUDA graphs, or launched kernel by kernel.

A graph spares the GPU the waits between kernels, as in training.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fairway.evaluation.text import Forward, LanguageModel
from fairway.model.gpt import GPT
from fairway.model.graphs import capture
from fairway.model.runtime import captures_graphs, compiles
from fairway.model.settings import RuntimeSettings

Capture = Callable[[LanguageModel, Tensor, int], Callable[[Tensor], Tensor]]
"""A model, tokens int64 [B, T] and the first position, of a kind of pass that has just run → the
pass as a function of its tokens. Its result holds until another captured pass runs."""


def forward_pass(
    model: LanguageModel, runtime: RuntimeSettings, capture_pass: Capture | None = None
) -> Forward:
    """The model's logits, computed as `runtime` asks for; to be called without gradients.

    capture_pass: how passes are captured where they are, by default as CUDA graphs.
    """
    if compiles(runtime, model):
        return torch.compile(model, dynamic=False)
    if captures_graphs(runtime, model):
        return replayed(model, capture_pass or graph_capture())
    return model


def replayed(model: LanguageModel, capture_pass: Capture) -> Forward:
    """The model's logits, replayed for every kind of pass that has come twice in a row.

    A kind is the shape of the tokens and the first position. The pass that begins a lane may need
    the logits of all positions, by far the largest output. Between it and the next of its kind run
    the lane's other passes, so it is launched, and no memory is kept for it. Kinds are few, since
    the first position follows from the settings and from whether a lane, or the text, begins.
    """
    captured: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
    latest: tuple[int, ...] | None = None

    @torch.no_grad()
    def logits(tokens: Tensor, first_position: int) -> Tensor:
        nonlocal latest
        if model.adapter is not None:  # its factors are new tensors in every pass
            return model(tokens, first_position)
        kind, before = (*tokens.shape, first_position), latest
        latest = kind
        if kind not in captured:
            if kind != before:
                return model(tokens, first_position)
            captured[kind] = capture_pass(model, tokens, first_position)
        return captured[kind](tokens).clone()  # the caller may hold those of several passes

    return logits


def graph_capture() -> Capture:
    """Captures CUDA graphs, which read the parameters where they lie: new values are seen.

    All compute in one pool of memory, so a replay may overwrite the logits that another graph has
    left there. In any order that is safe: a replay reads nothing that an earlier one left, for the
    tokens lie outside of the pool; and its logits are copied out before the next one, in the order
    of the one stream that all of it runs on.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture_pass(
        model: LanguageModel, tokens: Tensor, first_position: int
    ) -> Callable[[Tensor], Tensor]:
        # The launched pass was the warm-up.
        return capture(lambda own: model(own, first_position), [tokens], pool=pool)

    return capture_pass


@contextmanager
def deterministic_attention(model: GPT) -> Iterator[None]:
    """What is learned is part of the score, and an audit that repeats it must find it again."""
    model.deterministic_attention = True
    try:
        yield
    finally:
        model.deterministic_attention = False


class TimedForward:
    """A forward pass that adds up its time without waiting for the GPU."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._marks: list[tuple] = []

    def __call__(self, tokens: Tensor, first_position: int) -> Tensor:
        """As `Forward`."""
        begin = self._mark(tokens.is_cuda)
        logits = self._forward(tokens, first_position)
        self._marks.append((begin, self._mark(tokens.is_cuda)))
        return logits

    @staticmethod
    def _mark(is_cuda: bool):
        if not is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """The time of all calls so far; waits for the GPU."""
        if not self._marks or isinstance(self._marks[0][0], float):
            return sum(end - begin for begin, end in self._marks)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
