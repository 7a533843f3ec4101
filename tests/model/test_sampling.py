"""Text drawn from the model: with a cache as without, seeded, and in the right frequencies."""

import pytest
import torch

from fairway.model.sampling import drawn_tokens, sample, self_generated_tokens
from scattered import scattered_model

BOS = 1


@pytest.fixture(scope="module")
def model():
    return scattered_model()


def generate(model, **changes):
    arguments = {
        "sequences": 6,
        "tokens": 20,
        "temperature": 0.8,
        "batch_sequences": 6,
        "seed": 5,
        "bos_id": BOS,
    }
    return self_generated_tokens(model, **{**arguments, **changes})


def test_sampling_with_a_cache_equals_sampling_without(model):
    uniforms = torch.rand(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    sample = torch.full((6, 1), BOS)
    with torch.no_grad():
        for position in range(1, 20):
            logits = model(sample)[:, -1]
            drawn = drawn_tokens(logits.double() / 0.8, uniforms[:, position])
            sample = torch.cat((sample, drawn[:, None]), dim=1)
    assert torch.equal(generate(model), sample)


def test_sampling_is_seeded_and_independent_of_the_batch_size(model):
    sample = generate(model)
    assert sample.shape == (6, 20) and sample.dtype == torch.int64
    assert (sample[:, 0] == BOS).all() and len(sample.unique(dim=0)) == 6
    assert torch.equal(sample, generate(model))
    assert torch.equal(sample, generate(model, batch_sequences=4))
    assert not torch.equal(sample, generate(model, seed=6))


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], dtype=torch.float64).expand(20000, 4)
    uniforms = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        drawn = drawn_tokens(logits / temperature, uniforms)
        frequencies = drawn.bincount(minlength=4).double() / 20000
        expected = (logits[0] / temperature).softmax(0)
        assert torch.allclose(frequencies, expected, atol=0.015)
        assert frequencies[3] == 0


def test_extreme_uniform_numbers_draw_the_outermost_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=torch.float64).expand(2, 3)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert drawn_tokens(logits, uniforms).tolist() == [1, 2]


def test_each_tokens_log_probability_is_the_models_own(model):
    uniforms = torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tokens, log_probs = sample(model, uniforms, 0.8, BOS)
    with torch.no_grad():
        expected = (model(tokens[:, :-1]).double() / 0.8).log_softmax(-1)
    expected = expected.gather(2, tokens[:, 1:, None]).squeeze(2)
    assert log_probs.dtype == torch.float64 and log_probs[:, 0].isnan().all()
    # The cache adds up float32 products in another order.
    assert torch.allclose(log_probs[:, 1:], expected, atol=1e-4)
