"""The evaluation's forward pass: which passes are replayed, and with what result."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_model import CONFIG

from fairway.evaluation import forward
from fairway.evaluation.forward import Recording, forward_pass, graph_recorder, replayed
from fairway.model.gpt import GPT
from fairway.model.runtime import RuntimeSettings

FIRST, LATER, SMALL = ((3, 8), 0), ((3, 8), 5), ((2, 8), 5)


class Model:
    """Logits that tell tokens, first places and adapters apart; `launches` counts the calls."""

    def __init__(self) -> None:
        self.adapter, self.launches = None, 0

    def __call__(self, tokens: torch.Tensor, first_place: int) -> torch.Tensor:
        self.launches += 1
        return self.function(tokens, first_place)

    def function(self, tokens: torch.Tensor, first_place: int) -> torch.Tensor:
        logits = tokens[:, first_place:, None].float() + torch.arange(4)
        return -logits if self.adapter else logits


class Recorder:
    """Records without a GPU: a replay computes from its own tokens into its own logits."""

    def __init__(self) -> None:
        self.kinds: list[tuple[tuple[int, ...], int]] = []
        self.replays = 0

    def __call__(self, model: Model, tokens: torch.Tensor, first_place: int) -> Recording:
        self.kinds.append((tuple(tokens.shape), first_place))
        inputs = torch.zeros_like(tokens)
        logits = torch.zeros_like(model.function(tokens, first_place))

        def replay() -> None:
            self.replays += 1
            logits.copy_(model.function(inputs, first_place))

        return Recording(replay, inputs, logits)


def some_tokens(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def test_what_comes_twice_in_a_row_is_recorded_once():
    model, recorder = Model(), Recorder()
    logits = replayed(model, recorder)
    # Lanes that begin with all places; the kinds that follow return, in another order.
    passes = [FIRST, LATER, LATER, LATER, FIRST, LATER, FIRST, SMALL, SMALL, LATER, SMALL]
    is_replayed = [False, False, True, True, False, True, False, False, True, True, True]
    for number, ((shape, place), expected) in enumerate(zip(passes, is_replayed, strict=True)):
        launches, replays = model.launches, recorder.replays
        logits(some_tokens(shape, number), place)
        assert model.launches - launches == (not expected)
        assert recorder.replays - replays == expected
    assert recorder.kinds == [LATER, SMALL]


def test_logits_are_those_of_their_own_tokens_and_may_be_held():
    model, recorder = Model(), Recorder()
    logits = replayed(model, recorder)
    held = []
    for number, (shape, place) in enumerate([LATER, LATER, SMALL, SMALL, LATER, SMALL, LATER]):
        tokens = some_tokens(shape, number)
        held.append((logits(tokens, place), model.function(tokens, place)))
    assert recorder.replays == 5
    for found, expected in held:
        assert torch.equal(found, expected)


def test_an_adapted_model_is_launched_and_leaves_recordings_alone():
    model, recorder = Model(), Recorder()
    logits, tokens = replayed(model, recorder), some_tokens(LATER[0], 0)
    for adapter in ("one", "one", None, "one", None, "one"):
        model.adapter = adapter
        assert torch.equal(logits(tokens, 5), model.function(tokens, 5))
    # Two passes without an adapter follow each other, whatever ran in between.
    assert model.launches == 5 and recorder.replays == 1


def test_without_a_gpu_it_is_the_model_itself():
    settings = RuntimeSettings("cpu", "plain", "auto", "float32", "auto", "auto")
    model = GPT(CONFIG)
    assert forward_pass(model, settings) is model


@pytest.mark.parametrize(("cuda_graphs", "recorded"), [("auto", [LATER]), ("off", [])])
def test_fused_kernels_on_a_gpu_are_replayed_unless_that_is_off(monkeypatch, cuda_graphs, recorded):
    model, recorder = Model(), Recorder()
    model.kernels = "fused"
    model.token_embedding = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(forward, "graph_recorder", lambda: recorder)
    settings = RuntimeSettings("cuda", "auto", "auto", "auto", "auto", cuda_graphs)
    logits = forward_pass(model, settings)
    for number in range(3):
        logits(some_tokens(LATER[0], number), LATER[1])
    assert recorder.kinds == recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_replayed_logits_are_the_launched_ones_to_the_bit(dtype):
    pytest.importorskip("triton")
    config = replace(CONFIG, width=64, heads=4, kv_heads=2, mlp_width=128)
    model = GPT(config, seed=1).cuda()
    model.kernels, model.compute_dtype = "fused", dtype
    record, kinds = graph_recorder(), []

    def noted(model: GPT, tokens: torch.Tensor, first_place: int) -> Recording:
        kinds.append((tuple(tokens.shape), first_place))
        return record(model, tokens, first_place)

    logits = replayed(model, noted)
    whole, later = ((2, 96), 0), ((3, 96), 64)
    generator = torch.Generator(device="cuda").manual_seed(2)
    for change in range(3):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cuda")
            parameter.add_(0.2 * noise)
        held = []
        for number, (shape, place) in enumerate([later, later, whole, whole, later, whole, later]):
            tokens = some_tokens(shape, 10 * change + number).cuda()
            held.append((logits(tokens, place), model(tokens, place)))
        for found, expected in held:
            assert torch.isfinite(found).all() and torch.equal(found, expected)
    assert kinds == [later, whole]
