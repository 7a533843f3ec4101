"""The evaluation: sliding windows whose distributions adapters change as they go along.

An adapter sees a target only after its score is fixed, keeps its own state for each lane, and
changes the distribution of what follows. Adapters compose: each takes up the logits that the one
before it left.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fairway.config import check_adapters
from fairway.evaluation.adapters.lora import LoraAdapter, LoraSettings
from fairway.evaluation.adapters.ngram import Cache, NgramAdapter, NgramSettings, build_caches
from fairway.evaluation.adapters.slot import SlotAdapter, SlotSettings, score_batches
from fairway.evaluation.stream import (
    EvaluationSettings,
    ModelLogits,
    Rows,
    Scored,
    Stream,
    cut_stream,
    lane_groups,
    lane_steps,
    on_device,
    padded,
    score,
)
from fairway.model.gpt import GPT


class Adapter(Protocol):
    """What changes the distributions of one group of lanes. Rows of a pass must not meet in it."""

    def needed_places(self, step: int) -> int:
        """The last places of a window whose logits it needs, beside the scored ones."""

    def adapt(self, rows: Rows, logits: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Change a pass's logits [B, T − F, V] and those of its scored targets [m, V].

        Returns both, and the iterations of its fits, int64, if it makes any. A target's
        distribution may depend on the tokens before it, and on no others.
        """

    def learn(self, rows: Rows) -> None:
        """Take in the slice: its scores are fixed now."""


@dataclass(frozen=True)
class EvaluatorSettings:
    """The config sections that fix the evaluator's function."""

    evaluation: EvaluationSettings
    slot: SlotSettings | None = None
    lora: LoraSettings | None = None
    ngram: NgramSettings | None = None
    """Sections of adapters that `evaluation` does not list may be left out."""

    def __post_init__(self) -> None:
        check_adapters(asdict(self))

    @property
    def shares_batches(self) -> bool:
        """Whether windows share a delta, as in the record's code."""
        return "slot" in self.evaluation.adapters and self.slot.scope == "batch"


def evaluator_settings(sections: Mapping[str, Mapping[str, Any]]) -> EvaluatorSettings:
    """From a stage's settings; UserError where they do not fit together."""
    kinds = {
        "evaluation": EvaluationSettings,
        "slot": SlotSettings,
        "lora": LoraSettings,
        "ngram": NgramSettings,
    }
    return EvaluatorSettings(
        **{name: kind(**sections[name]) for name, kind in kinds.items() if name in sections}
    )


@torch.no_grad()
def score_stream(
    model_logits: ModelLogits,
    tokens: Tensor,
    settings: EvaluatorSettings,
    bos_id: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    kernels: str = "plain",
    model: GPT | None = None,
    seed: int = 0,
) -> Iterator[Scored]:
    """Score every target of `tokens` int64 [n + 1], or this rank's share of them, once.

    Lanes are split in groups of `forward_windows` (scope batch: one) that never meet and always
    have the same shapes; rank r takes groups r, r + world_size, …, so the scores are bitwise the
    same for any number of ranks. Within a lane targets come in order. kernels: how deltas are
    fitted, "plain" or "fused". model, seed: what LoRA adapts, and its initial factors. Raises
    UserError where the stream has fewer than two tokens.
    """
    stream = cut_stream(tokens, settings.evaluation, bos_id)
    groups = lane_groups(len(stream.windows), settings.evaluation, settings.shares_batches)
    uses_ngrams = "ngram" in settings.evaluation.adapters
    caches = build_caches(stream, settings.ngram) if uses_ngrams else []
    for group in groups[rank::world_size]:
        if settings.shares_batches:
            size = settings.evaluation.forward_windows
            yield from score_batches(model_logits, stream, settings.slot, size, kernels, *group[0])
        else:
            size = len(groups[0])
            adapters = make_adapters(stream, settings, size, kernels, model, seed, caches)
            yield from _score_lanes(model_logits, stream, group, size, adapters)


def make_adapters(
    stream: Stream,
    settings: EvaluatorSettings,
    size: int,
    kernels: str,
    model: GPT | None,
    seed: int,
    caches: list[Cache],
) -> list[Adapter]:
    """New ones for a group of `size` lanes, in the order of `evaluation.adapters`."""
    adapters: list[Adapter] = []
    for name in settings.evaluation.adapters:
        if name == "lora":
            assert model is not None, "LoRA needs the model, not only its logits"
            stride = settings.evaluation.stride_tokens
            adapters.append(LoraAdapter(model, size, settings.lora, stride, seed))
        elif name == "slot":
            adapters.append(SlotAdapter(stream, settings.slot, kernels))
        else:
            adapters.append(NgramAdapter(caches))
    return adapters


def _score_lanes(
    model_logits: ModelLogits,
    stream: Stream,
    group: list[tuple[int, range]],
    size: int,
    adapters: list[Adapter],
) -> Iterator[Scored]:
    """Step k scores the k-th window of every lane in the group."""
    device = stream.tokens.device
    table = lane_steps([run for _, run in group], size)
    index = on_device(table, device)
    lanes = on_device(padded([lane for lane, _ in group], size), device)
    for step in range(len(table)):
        needed = max((adapter.needed_places(step) for adapter in adapters), default=0)
        rows = Rows(stream, step, table[step], index[step], needed)
        logits = model_logits(rows.inputs, rows.first_place)
        scored = rows.at_scored(logits)
        stages, iterations = [scored], [rows.positions.new_zeros(0)]
        for adapter in adapters:
            logits, scored, made = adapter.adapt(rows, logits, scored)
            stages.append(scored)
            iterations.append(made)
        yield score(rows, lanes, stages, torch.cat(iterations))
        for adapter in adapters:
            adapter.learn(rows)


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target: log-softmax in float32 of logits [m, V], returned as float64 [m]."""
    log_probs = torch.log_softmax(logits.float(), dim=1)
    return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).double()
