"""The worked example of an adapter, used as a user would: by `module:Name`, beside the config."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluators import BOS, VOCABULARY, random_model
from fairway.audit.interface import Scores
from fairway.audit.runner import AuditSettings, audit
from fairway.errors import UserError
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.settings import EvaluationSettings
from fairway.plugins import search_beside
from fairway.settings import validated

HONEST, LEAKING = "unigram_cache:UnigramCache", "leaking_cache:LeakingCache"
WINDOWS = {"window_tokens": 32, "stride_tokens": 8, "lanes": 3, "forward_windows": 2}


@pytest.fixture(scope="module", autouse=True)
def _beside_the_config():
    search_beside([Path(__file__).parents[2] / "docs/examples"])


def evaluator(*adapters) -> Evaluator:
    settings = validated(EvaluationSettings, {"adapters": adapters, **WINDOWS}, "evaluation")
    return Evaluator(random_model(), settings, bos_id=BOS)


def habits() -> Tensor:
    """Documents of about ten windows, each with its own few words."""
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for _ in range(3):
        words = torch.randint(2, VOCABULARY, (5,), generator=generator)
        pieces += [torch.tensor([BOS]), words[torch.randint(5, (90,), generator=generator)]]
    return torch.cat(pieces)


def test_its_gain_stands_in_the_table_under_its_name():
    subject = evaluator({HONEST: {"weight": 0.3}})
    assert subject.adapters == [
        {"name": "unigramcache", "title": "Unigram cache", "kernels": "plain"}
    ]
    columns = subject.score_rank(habits()).columns
    assert columns["gain_unigramcache"].mean() > 0.2
    taken_off = columns["nll_before"] - columns["nll_after"]
    assert np.array_equal(columns["gain_unigramcache"], taken_off)


def test_its_distributions_are_those_of_the_counts_that_its_lane_has_scored():
    """Counted again with plain loops."""
    tokens, weight = habits(), 0.25
    subject = evaluator({HONEST: {"weight": weight}})
    documents = (tokens == BOS).cumsum(0).tolist()
    batches = sorted(subject.score(tokens), key=lambda batch: int(batch.positions[0]))
    scored: dict[int, list[int]] = {}  # lane → its positions
    for batch in batches:
        p, found = batch.logits[0].softmax(1), batch.logits[1].softmax(1)
        rows = list(zip(batch.lanes.tolist(), batch.positions.tolist(), strict=True))
        begins = {lane: min(p for at, p in rows if at == lane) for lane, _ in rows}
        for number, (lane, position) in enumerate(rows):
            document = documents[begins[lane] - 1]
            past = [
                int(tokens[before])
                for before in scored.get(lane, [])
                if documents[before] == document
            ]
            expected = p[number].double()
            if past and documents[position - 1] == document:
                counts = torch.bincount(torch.tensor(past), minlength=VOCABULARY)
                expected = (1 - weight) * expected + weight * counts / len(past)
            torch.testing.assert_close(found[number].double(), expected, rtol=1e-5, atol=1e-7)
        for lane, position in rows:
            scored.setdefault(lane, []).append(position)


@pytest.mark.parametrize(
    ("adapters", "fails"),
    [
        ([HONEST], []),
        pytest.param(
            [{"lora": {"rank": 2, "chunk_tokens": 8, "context_tokens": 16}}, "slot", HONEST],
            [],
            marks=pytest.mark.slow,
        ),
        ([LEAKING], ["flip", "self_influence"]),
        (["slot", LEAKING], ["flip", "self_influence"]),
    ],
)
def test_the_audit_passes_it_and_fails_its_leaking_twin(adapters, fails):
    subject = evaluator(*adapters)

    def evaluate(tokens: Tensor) -> Scores:
        found = subject.distributions(tokens)
        return Scores(found.log_probs, found.positions, found.nats, found.lanes)

    quick = AuditSettings(flips=8, stream_tokens=200, null_tokens=0)
    result = audit(evaluate, habits(), vocab_size=VOCABULARY, bos_id=BOS, settings=quick)
    assert result.names("FAIL") == fails
    assert {"flip", "self_influence", "normalization", "coverage"} - set(fails) <= set(
        result.names("PASS")
    )


def test_it_mixes_probabilities_so_it_comes_after_those_that_change_logits():
    with pytest.raises(UserError, match="evaluation.adapters.slot changes logits, so it must come"):
        evaluator(HONEST, "slot")


def test_a_wrong_key_of_it_is_told_like_one_of_fairways_own():
    with pytest.raises(UserError, match=r"UnigramCache: unknown key wait; did you mean weight\?"):
        evaluator({HONEST: {"wait": 0.1}})
