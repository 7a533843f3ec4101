"""The evaluation's forward pass: compiled, replayed as CUDA graphs, or launched kernel by kernel.

A graph spares the GPU the waits between kernels, as in training (training/gradients.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.evaluation.stream import ModelLogits
from fairway.model.gpt import GPT
from fairway.model.runtime import RuntimeSettings, compiles, record_graph, records_graphs


@dataclass(frozen=True)
class Recording:
    """A pass of one kind, and the memory that it reads and writes.

    tokens: int64 [B, T]. logits: float32 [B, T − F, V]; of use until something else is replayed.
    """

    replay: Callable[[], None]
    tokens: Tensor
    logits: Tensor


Record = Callable[[GPT, Tensor, int], Recording]
"""A model, tokens int64 [B, T] and the first place, of a kind that was launched just before."""


def forward_pass(model: GPT, settings: RuntimeSettings) -> ModelLogits:
    """The model's logits as `settings` ask for them; to be called without gradients."""
    if compiles(settings, model):
        return torch.compile(model, dynamic=False)
    return replayed(model, graph_recorder()) if records_graphs(settings, model) else model


def replayed(model: GPT, record: Record) -> ModelLogits:
    """The model's logits, replayed for every kind of pass that has come twice in a row.

    A kind is the shape of the tokens and the first place. The pass that begins a lane may need the
    logits of all places, by far the largest output; between it and the next of its kind are the
    lane's other passes, so it is launched and no memory is kept for it. Kinds are few, since the
    first place follows from the settings and from whether a lane, or the stream, begins.
    """
    recordings: dict[tuple[int, ...], Recording] = {}
    latest: tuple[int, ...] | None = None

    @torch.no_grad()
    def logits(tokens: Tensor, first_place: int) -> Tensor:
        nonlocal latest
        if model.adapter is not None:  # whose factors are new tensors in every pass
            return model(tokens, first_place)
        kind, before = (*tokens.shape, first_place), latest
        latest = kind
        if kind not in recordings:
            if kind != before:
                return model(tokens, first_place)
            recordings[kind] = record(model, tokens, first_place)
        recording = recordings[kind]
        recording.tokens.copy_(tokens)
        recording.replay()
        return recording.logits.clone()  # the caller may hold those of several passes

    return logits


def graph_recorder() -> Record:
    """Records CUDA graphs, which read the parameters where they lie: new values are seen.

    All compute in one pool of memory, so a replay may overwrite the logits that another recording
    has left there. In any order that is safe: a replay reads nothing that an earlier one left, for
    the tokens lie outside of the pool; and its logits are copied out before the next one, in the
    order of the one stream that all of it runs on.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(model: GPT, tokens: Tensor, first_place: int) -> Recording:
        # The launched pass was the warm-up.
        tokens = tokens.clone()
        graph, logits = record_graph(lambda: model(tokens, first_place), pool)
        return Recording(graph.replay, tokens, logits)

    return record
