"""Fit the weights of the n-gram caches on held-out training text; validation is never read.

    python benchmarks/fit_ngram.py --dataset results/data/embedded/manifest.json \\
        --artifact results/quickstart/seed-42/shared/gptq/artifact.bin --config config.yaml

The text is scored with the other adapters that the config lists, and the caches are mixed in
afterwards: L-BFGS finds the weights of least loss on every other document, and the gain on the
rest is printed for the config's own weights and for those found.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import yaml
from context import say
from held_out import (
    add_arguments,
    first_sections,
    held_out_evaluator,
    held_out_text,
    score_held_out,
)
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.adapters.ngram import (
    WEIGHT_UNIT,
    Cache,
    CacheSettings,
    NgramSettings,
    build_caches,
    mixture_weight,
    recent_occurrences,
)
from fairway.evaluation.text import Text, cut_text
from fairway.evaluation.token_table import RankScores
from fairway.recipe import load_config
from fairway.stage import user_errors


class Weights(NamedTuple):
    """Of a cache, what is fitted: as in CacheSettings, or float64 tensors."""

    bias: float | Tensor
    order_weight: float | Tensor
    count_weight: float | Tensor
    variety_weight: float | Tensor
    distance_power: float | Tensor

    @classmethod
    def of(cls, settings: CacheSettings) -> "Weights":
        return cls(*(getattr(settings, name) for name in cls._fields))


@dataclass(frozen=True)
class Evidence:
    """What a cache found for one order.

    log_distances float32, exists, hits bool [n, R]: of every occurrence, and whether the target
    followed. number, distinct: int64 [n], occurrences and different followers.
    """

    order: int
    log_distances: Tensor
    exists: Tensor
    hits: Tensor
    number: Tensor
    distinct: Tensor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    sections = first_sections(load_config(options.config))
    evaluation = sections["evaluation"]
    listed = [one for one in evaluation.adapters if one.name == "ngram"]
    others = evaluation.changed(adapters=[one for one in evaluation.adapters if one not in listed])
    dataset, tokens = held_out_text(options)
    text = cut_text(torch.from_numpy(tokens.astype("int64")), evaluation, dataset.bos_id)
    fits = text.documents[:-1] % 2 == 0
    if fits.all() or not fits.any():
        raise UserError("one document is not enough to fit and to measure: raise --tokens")
    caches = build_caches(text, listed[0].settings if listed else NgramSettings())
    found = [evidence(cache, text) for cache in caches]
    evaluator = held_out_evaluator(options, sections, dataset).with_settings(others)
    loss = losses(score_held_out(evaluator, tokens)[0])
    own = [Weights.of(cache.settings) for cache in caches]
    fitted = fit(loss, found, own, fits)
    for name, weights in (("config", own), ("fitted", fitted)):
        gain = loss + mixed(loss, found, weights).log()
        say(
            f"{name}: gain {float(gain[fits].mean()):.5f} nats a token on the documents fitted to, "
            f"{float(gain[~fits].mean()):.5f} on the others"
        )
    settings = [
        cache.settings.changed(**weights._asdict()).model_dump(mode="json")
        for cache, weights in zip(caches, fitted, strict=True)
    ]
    overlay = {"evaluation": {"adapters": {"ngram": {"caches": settings}}}}
    say(yaml.safe_dump(overlay, sort_keys=False))


def losses(scores: RankScores) -> Tensor:
    """Nats of every target in the text's order, float64 [n]."""
    order = scores.columns["position"].argsort()
    return torch.from_numpy(scores.columns["nll_after"][order])


def evidence(cache: Cache, text: Text) -> list[Evidence]:
    """What each order of the cache finds for every target."""
    targets = text.tokens[1:]
    positions = torch.arange(len(targets), device=targets.device)
    parts = []
    for order, occurrences in cache.found.items():
        recent = recent_occurrences(occurrences, positions, cache.settings.recent_occurrences)
        ordered = torch.where(recent.exists, recent.followers, -1).sort(1).values
        changes = (ordered.diff(dim=1) != 0) & (ordered[:, 1:] >= 0)
        parts.append(
            Evidence(
                order,
                log_distances=recent.distances.float().log(),
                exists=recent.exists,
                hits=(recent.followers == targets.unsqueeze(1)) & recent.exists,
                number=recent.exists.sum(1),
                distinct=changes.sum(1) + (ordered[:, 0] >= 0),
            )
        )
    return parts


def mixed(loss: Tensor, found: Sequence[list[Evidence]], weights: Sequence[Weights]) -> Tensor:
    """The targets' probabilities, [n], under caches with these weights."""
    p = torch.exp(-loss)
    for parts, own in zip(found, weights, strict=True):
        power = torch.as_tensor(own.distance_power).clamp(min=0)
        for part in parts:
            share = mixture_weight(part.order, part.number, part.distinct, own)
            weights = torch.exp(-power * part.log_distances) * part.exists
            hits = (weights * part.hits).sum(1) / weights.sum(1).clamp(min=WEIGHT_UNIT)
            p = (1 - share) * p + share * hits
    return p


def fit(
    loss: Tensor, found: Sequence[list[Evidence]], start: Sequence[Weights], fits: Tensor
) -> list[Weights]:
    """Each cache's weights of least mean loss where `fits`, bool [n], to two decimals."""
    weights = torch.tensor(start, dtype=torch.float64, device=loss.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        mean = -mixed(loss, found, [Weights(*row) for row in weights]).log()[fits].mean()
        mean.backward()
        return mean

    optimizer.step(closure)
    fitted = [Weights(*(round(weight, 2) for weight in row)) for row in weights.tolist()]
    return [row._replace(distance_power=max(row.distance_power, 0.0)) for row in fitted]


if __name__ == "__main__":
    with user_errors():
        main()
