"""The evaluator as an object: what a notebook does with it."""

import io
import math

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from evaluators import SMALL, audited, changed, evaluator, random_model, toy_text
from fairway.data.tokenizer import TRAINER
from fairway.errors import UserError
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.text import target_nats
from fairway.evaluation.token_table import table_metrics, token_table

DOCUMENTS = ["the letter of the house", "a sound, and the house again; a sound"]


@pytest.fixture(scope="module")
def tokenizer():
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS * 40), model_writer=model, vocab_size=290, **TRAINER
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def test_documents_are_scored_to_a_table_and_bits_per_byte(tokenizer):
    model = random_model(290)
    subject = Evaluator(model, changed(SMALL, adapters=("ngram",)), bos_id=tokenizer.bos_id())
    table = subject.score_documents(DOCUMENTS, tokenizer)
    ids = [token for text in DOCUMENTS for token in (tokenizer.bos_id(), *tokenizer.encode(text))]
    assert table["token"].tolist() == ids[1:]
    assert table["document"].unique().tolist() == [0, 1]
    assert table["bytes"].sum() == sum(len(text.encode()) for text in DOCUMENTS)
    assert table.columns.tolist() == [
        "position", "document", "token", "window", "lane", "nll_before", "nll_after", "bytes",
        "in_own_loss", "gain_ngram",
    ]  # fmt: skip
    metrics = table_metrics(table)
    bits = table["nll_after"].sum() / math.log(2) / table["bytes"].sum()
    assert metrics["val_bpb"] == pytest.approx(bits, rel=1e-12)
    assert metrics["gain_ngram_nats"] == pytest.approx(metrics["gain_nats"], abs=1e-12)


def test_other_settings_share_the_model_and_its_forward_pass():
    model, tokens = random_model(), toy_text(80)
    subject = evaluator(model, SMALL)
    plain = subject.with_settings(changed(SMALL, adapters=()))
    assert plain.model is model and plain.forward is subject.forward
    expected = evaluator(model, changed(SMALL, adapters=())).distributions(tokens)
    assert torch.equal(plain.distributions(tokens).log_probs, expected.log_probs)
    assert subject.settings is SMALL and subject.forward.seconds() > 0


def test_windows_are_counted_as_they_are_scored():
    tokens = toy_text(261)
    for settings in (SMALL, changed(SMALL, scope="batch")):
        subject = evaluator(random_model(), settings)
        done = []
        for rank in range(2):
            own, total = subject.window_counts(len(tokens) - 1, rank, 2)
            finished = []
            subject.score_rank(tokens, rank, 2, advance=finished.append)
            assert sum(finished) == own
            done.append(own)
        assert sum(done) == total


def test_ranks_put_together_are_the_same_table():
    tokens = toy_text(200)
    subject = evaluator(random_model(), SMALL)
    counts = ByteCountsOfOne()
    parts = [subject.score_rank(tokens, rank, 2) for rank in range(2)]
    together = token_table(parts, tokens.numpy(), counts, 1)
    alone = token_table([subject.score_rank(tokens)], tokens.numpy(), counts, 1)
    assert together.equals(alone)


def test_distributions_account_for_every_target():
    tokens = toy_text(100)
    scores = audited(random_model(), SMALL)(tokens)
    found = target_nats(scores.log_probs[scores.positions - 1], tokens[scores.positions])
    assert torch.equal(scores.positions.sort().values, torch.arange(1, 100))
    torch.testing.assert_close(found, scores.reported_nll, rtol=0, atol=1e-5)


class ByteCountsOfOne:
    """One byte a token."""

    base = np.ones(24, np.int16)
    leading_space = np.zeros(24, np.bool_)
    boundary = np.zeros(24, np.bool_)


@pytest.mark.parametrize(
    ("column", "message"),
    [("nll_before", "without any adapter: check the artifact"), ("nll_after", "after adaptation")],
)
def test_a_loss_that_is_not_finite_is_refused_with_its_token(column, message):
    tokens = toy_text(60)
    part = evaluator(random_model(), SMALL).score_rank(tokens)
    part.columns[column][part.columns["position"] == 7] = np.nan
    with pytest.raises(UserError, match=f"validation token 7 is not finite {message}"):
        token_table([part], tokens.numpy(), ByteCountsOfOne(), 1)
