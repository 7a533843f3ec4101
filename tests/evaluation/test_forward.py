"""The evaluation's forward pass: which passes are replayed, and with what result."""

from types import SimpleNamespace

import pytest
import torch

from evaluators import random_model
from fairway.evaluation.forward import TimedForward, forward_pass, graph_capture, replayed
from fairway.model.gpt import GPT
from fairway.model.settings import RuntimeSettings
from fairway.model.spec import GPTConfig

FIRST, LATER, SMALL = ((3, 8), 0), ((3, 8), 5), ((2, 8), 5)


class Model:
    """Logits that tell tokens, first positions and adapters apart; `launches` counts the calls."""

    def __init__(self) -> None:
        self.adapter, self.launches = None, 0

    def __call__(self, tokens: torch.Tensor, first_position: int) -> torch.Tensor:
        self.launches += 1
        return self.function(tokens, first_position)

    def function(self, tokens: torch.Tensor, first_position: int) -> torch.Tensor:
        logits = tokens[:, first_position:, None].float() + torch.arange(4)
        return -logits if self.adapter else logits


class FakeCapture:
    """Captures without a GPU: a replay computes into memory that the next one overwrites."""

    def __init__(self) -> None:
        self.kinds: list[tuple[tuple[int, ...], int]] = []
        self.replays = 0

    def __call__(self, model: Model, tokens: torch.Tensor, first_position: int):
        self.kinds.append((tuple(tokens.shape), first_position))
        logits = torch.zeros_like(model.function(tokens, first_position))

        def replay(tokens: torch.Tensor) -> torch.Tensor:
            self.replays += 1
            return logits.copy_(model.function(tokens, first_position))

        return replay


def some_tokens(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def test_what_comes_twice_in_a_row_is_captured_once():
    model, capture = Model(), FakeCapture()
    logits = replayed(model, capture)
    # Lanes that begin with all positions; the kinds that follow return, in another order.
    passes = [FIRST, LATER, LATER, LATER, FIRST, LATER, FIRST, SMALL, SMALL, LATER, SMALL]
    is_replayed = [False, False, True, True, False, True, False, False, True, True, True]
    for number, ((shape, first), expected) in enumerate(zip(passes, is_replayed, strict=True)):
        launches, replays = model.launches, capture.replays
        logits(some_tokens(shape, number), first)
        assert model.launches - launches == (not expected)
        assert capture.replays - replays == expected
    assert capture.kinds == [LATER, SMALL]


def test_logits_are_those_of_their_own_tokens_and_may_be_held():
    model, capture = Model(), FakeCapture()
    logits = replayed(model, capture)
    held = []
    for number, (shape, first) in enumerate([LATER, LATER, SMALL, SMALL, LATER, SMALL, LATER]):
        tokens = some_tokens(shape, number)
        held.append((logits(tokens, first), model.function(tokens, first)))
    assert capture.replays == 5
    for found, expected in held:
        assert torch.equal(found, expected)


def test_an_adapted_model_is_launched_and_leaves_captured_passes_alone():
    model, capture = Model(), FakeCapture()
    logits, tokens = replayed(model, capture), some_tokens(LATER[0], 0)
    for adapter in ("one", "one", None, "one", None, "one"):
        model.adapter = adapter
        assert torch.equal(logits(tokens, 5), model.function(tokens, 5))
    # Two passes without an adapter follow each other, whatever ran in between.
    assert model.launches == 5 and capture.replays == 1


def test_without_a_gpu_it_is_the_model_itself():
    model = random_model()
    assert forward_pass(model, RuntimeSettings(device="cpu")) is model


@pytest.mark.parametrize(("cuda_graphs", "captured"), [("auto", [LATER]), ("off", [])])
def test_fused_kernels_on_a_gpu_are_replayed_unless_that_is_off(cuda_graphs, captured):
    model, capture = Model(), FakeCapture()
    model.kernels = "fused"
    model.token_embedding = SimpleNamespace(device=torch.device("cuda"))
    settings = RuntimeSettings(device="cuda", cuda_graphs=cuda_graphs)
    logits = forward_pass(model, settings, capture)
    for number in range(3):
        logits(some_tokens(LATER[0], number), LATER[1])
    assert capture.kinds == captured


def test_the_time_of_all_passes_is_added_up():
    model = Model()
    timed = TimedForward(model)
    assert timed.seconds() == 0
    for number in range(2):
        tokens = some_tokens(LATER[0], number)
        assert torch.equal(timed(tokens, 5), model.function(tokens, 5))
    assert timed.seconds() > 0 and model.launches == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_replayed_logits_are_the_launched_ones_to_the_bit(dtype):
    fused = pytest.importorskip("fairway.model.fused.forward_backward")
    config = random_model().config
    model = GPT(
        GPTConfig(**{**dict(config), "width": 64, "mlp_width": 128, "vocab_size": 50}), seed=1
    ).cuda()
    model.backend, model.compute_dtype = fused, dtype
    capture_pass, kinds = graph_capture(), []

    def noted(model: GPT, tokens: torch.Tensor, first_position: int):
        kinds.append((tuple(tokens.shape), first_position))
        return capture_pass(model, tokens, first_position)

    logits = replayed(model, noted)
    whole, later = ((2, 96), 0), ((3, 96), 64)
    generator = torch.Generator(device="cuda").manual_seed(2)
    for change in range(3):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cuda")
            parameter.add_(0.2 * noise)
        held = []
        for number, (shape, first) in enumerate([later, later, whole, whole, later, whole, later]):
            tokens = some_tokens(shape, 10 * change + number).cuda()
            held.append((logits(tokens, first), model(tokens, first)))
        for found, expected in held:
            assert torch.isfinite(found).all() and torch.equal(found, expected)
    assert kinds == [later, whole]
