"""Fit the weights of `ngram.caches` on held-out training text; validation is never read.

    python benchmarks/fit_ngram.py --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/causal/gptq/artifact.bin --config config.yaml

The text is scored with the other adapters that the config lists, and the caches are mixed in
afterwards: L-BFGS finds the weights of least loss on every other document, and the gain on the
rest is printed for the config's own weights and for those found.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from context import say
from held_out import add_arguments, held_out_text, score_held_out
from torch import Tensor

from fairway.command import run
from fairway.config import load_config, merge
from fairway.errors import UserError
from fairway.evaluation.adapters.ngram import (
    Cache,
    CacheSettings,
    NgramSettings,
    build_caches,
    recent_followers,
    trust,
)
from fairway.evaluation.stream import EvaluationSettings, Stream, cut_stream
from fairway.evaluation.token_table import RankScores

WEIGHTS = ("bias", "order_weight", "count_weight", "variety_weight")


@dataclass(frozen=True)
class Evidence:
    """What a cache found for one order, [n] each: how often the target followed, of how many."""

    order: int
    hits: Tensor
    number: Tensor
    kinds: Tensor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    config = load_config(options.config)
    others = [name for name in config["evaluation"]["adapters"] if name != "ngram"]
    dataset, tokens = held_out_text(options)
    stream = cut_stream(
        torch.from_numpy(tokens.astype("int64")),
        EvaluationSettings(**config["evaluation"]),
        dataset.bos_id,
    )
    fits = stream.documents[:-1] % 2 == 0
    if fits.all() or not fits.any():
        raise UserError("one document is not enough to fit and to measure: raise --tokens")
    caches = build_caches(stream, NgramSettings(**config["ngram"]))
    found = [(cache.settings, evidence(cache, stream)) for cache in caches]
    without = merge(config, {"evaluation": {"adapters": others}})
    loss = losses(score_held_out(options, without, dataset, tokens)[0])
    fitted = fit(loss, found, fits)
    for name, settings in (("config", [own for own, _ in found]), ("fitted", fitted)):
        gain = loss + mixed(loss, found, settings).log()
        say(
            f"{name}: gain {float(gain[fits].mean()):.5f} nats a token on the documents fitted to, "
            f"{float(gain[~fits].mean()):.5f} on the others"
        )
    say(yaml.safe_dump({"ngram": {"caches": [vars(cache) for cache in fitted]}}, sort_keys=False))


def losses(scores: RankScores) -> Tensor:
    """Nats of every target in the stream's order, float64 [n]."""
    order = scores.columns["position"].argsort()
    return torch.from_numpy(scores.columns["nll_after"][order])


def evidence(cache: Cache, stream: Stream) -> list[Evidence]:
    targets = stream.tokens[1:]
    places = torch.arange(len(targets), device=targets.device)
    parts = []
    for order, occurrences in cache.found.items():
        followers, exists = recent_followers(occurrences, places, cache.settings.recent_occurrences)
        hits = ((followers == targets.unsqueeze(1)) & exists).sum(1)
        ordered = torch.where(exists, followers, -1).sort(1).values
        kinds = ((ordered.diff(dim=1) != 0) & (ordered[:, 1:] >= 0)).sum(1) + (ordered[:, 0] >= 0)
        parts.append(Evidence(order, hits, exists.sum(1), kinds))
    return parts


def mixed(
    loss: Tensor,
    found: Sequence[tuple[CacheSettings, list[Evidence]]],
    settings: Sequence[CacheSettings],
) -> Tensor:
    """The targets' probabilities, [n], under caches with these settings."""
    p = torch.exp(-loss)
    for (_, parts), cache in zip(found, settings, strict=True):
        for part in parts:
            share = trust(part.order, part.number, part.kinds, cache)
            p = (1 - share) * p + share * part.hits / part.number.clamp(min=1)
    return p


def fit(
    loss: Tensor, found: Sequence[tuple[CacheSettings, list[Evidence]]], fits: Tensor
) -> list[CacheSettings]:
    """The caches with the weights of least mean loss where `fits`, bool [n]."""
    start = [[getattr(own, name) for name in WEIGHTS] for own, _ in found]
    weights = torch.tensor(start, dtype=torch.float64, device=loss.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def settings(rows: Sequence[Sequence[Any]]) -> list[CacheSettings]:
        return [
            replace(own, **dict(zip(WEIGHTS, row, strict=True)))
            for (own, _), row in zip(found, rows, strict=True)
        ]

    def closure() -> Tensor:
        optimizer.zero_grad()
        mean = -mixed(loss, found, settings(weights)).log()[fits].mean()
        mean.backward()
        return mean

    optimizer.step(closure)
    return settings([[round(weight, 2) for weight in row] for row in weights.tolist()])


if __name__ == "__main__":
    run(main)
