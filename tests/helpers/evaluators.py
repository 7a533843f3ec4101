"""What tests of evaluators share: settings, models, texts, and flips to feel leaks by."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.audit.interface import Scores
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.settings import AdapterChoice, EvaluationSettings
from fairway.evaluation.windows import WindowSettings, sliding_windows
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig
from fairway.plugins import load
from fairway.settings import Settings, validated

BOS = 1
VOCABULARY = 24

WINDOWS = dict(window_tokens=32, stride_tokens=6, lanes=5, forward_windows=2)
ADAPTERS = {
    "lora": dict(
        rank=2,
        projections=("query", "value"),
        scales=False,
        learning_rate=0.05,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        gradient_clip=1.0,
        steps=1,
        chunk_tokens=6,
        context_tokens=24,
    ),
    "slot": dict(
        scope="window",
        batch_windows=4,
        focal_tokens="all",
        l2=3.0,
        clamp=5.0,
        iterations=25,
        history=10,
        same_document=True,
        context_logits="current",
    ),
    "ngram": dict(
        caches=(
            dict(
                reach="stream",
                orders=(2, 4),
                recent_occurrences=3,
                bias=-2.0,
                order_weight=0.5,
                count_weight=0.5,
                variety_weight=2.0,
            ),
            dict(
                reach="document",
                orders=(1, 2, 3, 5),
                recent_occurrences=4,
                bias=-1.0,
                order_weight=0.3,
                count_weight=1.0,
                variety_weight=1.5,
                distance_power=0.6,
            ),
        )
    ),
}
"""Small settings of the built-in adapters; their subclasses take the same."""


def changed(settings: EvaluationSettings, **changes: Any) -> EvaluationSettings:
    """`settings` with changed keys, each of the windows or of an adapter.

    adapters: other names; an adapter keeps the settings that it has in `settings`. A key of a
    built-in adapter that is not listed changes nothing.
    """
    given = {choice.name: dict(choice.settings) for choice in settings.adapters}
    names = changes.pop("adapters", tuple(given))
    windows = {key: changes.pop(key, getattr(settings, key)) for key in WindowSettings.model_fields}
    adapters, taken = [], {key for section in ADAPTERS.values() for key in section}
    for name in names:
        keys = load(name, AdapterChoice.package).Settings.model_fields
        section = given.get(name, small_settings(name))
        adapters.append({name: section | {key: changes[key] for key in keys if key in changes}})
        taken |= set(keys)
    assert taken >= set(changes), f"nothing has {set(changes) - taken}"
    return validated(EvaluationSettings, {**windows, "adapters": adapters}, "evaluation")


def small_settings(name: str) -> dict[str, Any]:
    """ADAPTERS' of the built-in adapter that the class `name` is or inherits from."""
    found = load(name, AdapterChoice.package)
    sections = (
        section
        for kind, section in ADAPTERS.items()
        if issubclass(found, load(kind, AdapterChoice.package))
    )
    return next(sections, {})


SMALL = changed(EvaluationSettings(adapters=()), adapters=("slot",), **WINDOWS)


def adapter_settings(settings: EvaluationSettings, name: str) -> Settings:
    """Those of the adapter `name`."""
    return next(choice.settings for choice in settings.adapters if choice.name == name)


def focal_tokens(settings: EvaluationSettings) -> int:
    """The window's last positions that a delta may be fitted to."""
    focal = adapter_settings(settings, "slot").focal_tokens
    return settings.window_tokens if focal == "all" else int(focal)


class ToyModel:
    """A causal model: the last token's logits plus `memory` times the window's average so far.

    calls: the shape of the tokens and the first position of every call.
    """

    def __init__(self, memory: float = 2.0, device: str = "cpu", kernels: str = "plain") -> None:
        generator = torch.Generator().manual_seed(0)
        self.memory, self.kernels = memory, kernels
        self.embedding = torch.randn(VOCABULARY, 16, generator=generator).to(device)
        self.head = (torch.randn(16, VOCABULARY, generator=generator) / 2).to(device)
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, tokens: Tensor, first_position: int = 0) -> Tensor:
        self.calls.append((tuple(tokens.shape), first_position))
        states = self.embedding[tokens]
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).reshape(1, -1, 1)
        average = states.cumsum(1) / counts
        return ((states + self.memory * average) @ self.head)[:, first_position:]


def random_model(
    vocab_size: int = VOCABULARY, seed: int = 0, layers: int = 2, **features: Any
) -> GPT:
    """Random weights everywhere: at the true start whole layers are zero. features: of the model,
    switched on."""
    config = GPTConfig(
        vocab_size=vocab_size, sequence_tokens=32, layers=layers, width=16, heads=4, kv_heads=2,
        mlp_width=32, rotary_dimensions=4, rope_base=10000.0, rope_trained_tokens=16,
        bigram_buckets=16, bigram_width=4, value_width=4, value_layers=(1,), logit_softcap=30.0,
        query_gain=5.0, **features,
    )  # fmt: skip
    model = GPT(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def toy_text(length: int, seed: int = 0, document_tokens: int = 40) -> Tensor:
    """Documents of random length, each with its own favorite tokens; BOS first."""
    generator = torch.Generator().manual_seed(seed)
    pieces, total = [], 0
    while total < length:
        size = int(torch.randint(2, 2 * document_tokens, (1,), generator=generator))
        weights = torch.rand(VOCABULARY, generator=generator) ** 4
        weights[BOS] = 0
        piece = torch.multinomial(weights, size, replacement=True, generator=generator)
        piece[0] = BOS
        pieces.append(piece)
        total += size
    return torch.cat(pieces)[:length]


def evaluator(model, settings: EvaluationSettings, seed: int = 0) -> Evaluator:
    return Evaluator(model, settings, bos_id=BOS, seed=seed)


def collect(tokens, settings, model=None, rank=0, world_size=1) -> dict[str, Tensor]:
    """What a rank scores of a whole text as one dict of tensors, sorted by position."""
    batches = list(evaluator(model or ToyModel(), settings).score(tokens, rank, world_size))
    names = ("positions", "windows", "lanes", "targets", "in_own_loss")
    columns = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    columns["logits_before"] = torch.cat([batch.logits[0] for batch in batches])
    columns["logits_after"] = torch.cat([batch.logits[-1] for batch in batches])
    order = columns["positions"].argsort(stable=True)
    return {name: column[order] for name, column in columns.items()}


def score_columns(model, tokens, settings) -> dict[str, np.ndarray]:
    """The columns of tokens.parquet, in the order of the text."""
    columns = evaluator(model, settings).score_rank(tokens).columns
    order = columns["position"].argsort()
    return {name: column[order] for name, column in columns.items()}


def windows_of(tokens, settings):
    return sliding_windows(len(tokens) - 1, settings.window_tokens, settings.stride_tokens)


def audited(model, settings: EvaluationSettings, world_size: int = 1) -> Callable[[Tensor], Scores]:
    """The evaluator as the audit wants it."""

    def evaluate(tokens: Tensor) -> Scores:
        found = evaluator(model, settings).distributions(tokens, world_size)
        return Scores(found.log_probs, found.positions, found.nats, found.lanes)

    return evaluate


def reaches_of_flips(
    evaluate: Callable[[Tensor], Scores], tokens: Tensor, flips: int, bos_id: int, vocab_size: int
) -> list[int]:
    """For each target up to a flipped token whose distribution changes with it: how far before.

    Flips over the text: another token, a BOS where there was none, a BOS taken away.
    """
    unflipped = evaluate(tokens).log_probs
    positions = np.linspace(1, len(tokens) - 1, flips).astype(int).tolist()
    positions += torch.nonzero(tokens == bos_id).squeeze(1)[1:3].tolist()
    reaches = []
    for index, position in enumerate(positions):
        flipped = tokens.clone()
        flipped[position] = bos_id if index % 3 == 0 else (tokens[position] + 7) % vocab_size
        differs = (evaluate(flipped).log_probs != unflipped).any(1)
        felt = torch.nonzero(differs).squeeze(1) + 1
        assert position == len(tokens) - 1 or len(felt) or flipped[position] == tokens[position]
        reaches += (position - felt[felt <= position]).tolist()
    return reaches
