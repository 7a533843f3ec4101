"""CUDA graphs: a captured computation is the eager one, for new inputs too. Needs a GPU."""

import pytest
import torch

from fairway.model.gpt import GPT
from fairway.model.graphs import capture
from fairway.model.sampling import sample
from scattered import scattered_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
BOS = 1


def test_a_graph_reads_new_inputs_and_new_values_of_what_it_does_not_copy():
    weight = torch.tensor([2.0], device="cuda")
    x = torch.tensor([3.0], device="cuda")
    graph = capture(lambda given: weight * given, (x,), warm_up_runs=1)
    assert graph(x).item() == 6.0
    assert graph(x + 1).item() == 8.0 and x.item() == 3.0
    weight.fill_(5.0)
    assert graph(x).item() == 15.0


def test_what_is_written_in_place_is_as_before_the_capture():
    total = torch.tensor([1.0], device="cuda")
    graph = capture(lambda: total.add_(1.0), warm_up_runs=3, changes=[total])
    assert total.item() == 1.0
    graph()
    graph()
    assert total.item() == 3.0


def differences(model: GPT, uniforms: torch.Tensor) -> torch.Tensor:
    """Of the drawn tokens' log-probabilities, from those of a whole forward pass."""
    tokens, found = sample(model, uniforms, 0.8, BOS)
    with torch.no_grad():
        logits = model(tokens[:, :-1].cuda()).double() / 0.8
    expected = logits.log_softmax(-1).gather(2, tokens[:, 1:, None].cuda()).squeeze(2).cpu()
    return found[:, 1:] - expected


def test_captured_sampling_is_the_models_own():
    uniforms = torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    model = scattered_model().cuda()
    assert differences(model, uniforms).abs().max() < 1e-4
    first, again = (sample(model, uniforms, 0.8, BOS) for _ in range(2))
    assert torch.equal(first[0], again[0])
