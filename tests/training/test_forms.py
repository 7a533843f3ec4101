"""What changes during a training: the length of the sequences, recurrence, late QAT."""

import numpy as np
import pytest
import torch

from fairway.data.loader import CoprimeLoader
from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.settings import validated
from fairway.training.checkpoint import Checkpoints
from fairway.training.trainer import Form, Trainer, TrainSettings
from trainings import SMALL

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
PLAIN = TrainSettings(
    sequence_tokens=24, batch_tokens=96, micro_batch_sequences=2, max_steps=10, max_seconds=None,
    warmup_steps=0, warmdown_steps=4, late_qat_scale=0.3, ema_decays=(0.9,),
)  # fmt: skip
RECURRENT = SMALL.changed(recurrent_layers=(1, 2), recurrence_passes=3)
SCHEDULED = PLAIN.changed(sequence_schedule=[[0.2, 6], [0.6, 12]], recurrence_from=0.4)
FORMS = [
    *[Form(6, False, False)] * 2,
    *[Form(12, False, False)] * 2,
    *[Form(12, True, False)] * 2,
    *[Form(24, True, False)] * 3,
    Form(24, True, True),
]
"""Of the ten steps of SCHEDULED."""


class Text:
    """Tokens in memory in place of a span of a shard."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def read(self) -> np.ndarray:
        return self.tokens

    def __len__(self) -> int:
        return len(self.tokens)


def make_trainer(settings, folder, stop_in_step=None):
    """A trainer and the list of what its micro-batches get: the form, inputs, targets."""
    text = Text(np.random.default_rng(0).integers(0, 50, 700).astype(np.uint16))
    loader = CoprimeLoader([text], settings.sequence_tokens, settings.batch_sequences, seed=3)
    model = GPT(RECURRENT, seed=0)
    trainer = Trainer(
        model, settings, loader, WORLD, Checkpoints(folder, "a" * 64),
        fake_quantize=lambda name, matrices: matrices * 1.0,
    )  # fmt: skip
    seen, backward = [], trainer.backward

    def recorded(inputs, targets, factor):
        late_qat = model.fake_quantize is not None
        seen.append((Form(inputs.shape[1], model.recurs, late_qat), inputs, targets))
        if trainer.progress.step + 1 == stop_in_step:
            trainer.signal_number = 15
        return backward(inputs, targets, factor)

    trainer.backward = recorded
    return trainer, seen


def flat(seen, part):
    return torch.cat([one[part].flatten() for one in seen])


def test_a_schedule_cuts_the_same_tokens_in_the_same_order(tmp_path):
    runs = []
    for name, settings in (("plain", PLAIN), ("scheduled", SCHEDULED)):
        trainer, seen = make_trainer(settings, tmp_path / name)
        trainer.run()
        runs.append(seen)
        assert trainer.model.recurs and trainer.model.fake_quantize is None
    plain, scheduled = runs
    assert [form for form, _, _ in scheduled[::2]] == FORMS
    assert [form for form, _, _ in scheduled[1::2]] == FORMS  # two micro-batches a step
    assert all(inputs.numel() == 48 for _, inputs, _ in scheduled)
    for part in (1, 2):
        assert torch.equal(flat(plain, part), flat(scheduled, part))


@pytest.mark.parametrize("stop_in_step", [1, 4, 9])
def test_a_run_stopped_anywhere_resumes_to_the_same_weights(tmp_path, stop_in_step):
    whole, expected = make_trainer(SCHEDULED, tmp_path / "whole")
    whole.run()
    first, before = make_trainer(SCHEDULED, tmp_path / "halves", stop_in_step)
    with pytest.raises(SystemExit):
        first.run()
    second, after = make_trainer(SCHEDULED, tmp_path / "halves")
    second.run()
    assert [one[0] for one in before + after] == [one[0] for one in expected]
    assert torch.equal(flat(before + after, 1), flat(expected, 1))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_warm_up_meets_every_form_and_changes_nothing(tmp_path):
    cold, expected = make_trainer(SCHEDULED, tmp_path / "cold")
    warm, seen = make_trainer(SCHEDULED.changed(warmup_steps=2), tmp_path / "warm")
    for trainer in (cold, warm):
        trainer.run()
    warmed, trained = seen[: -len(expected)], seen[-len(expected) :]
    assert {form for form, _, _ in warmed} == set(FORMS)
    assert torch.equal(flat(trained, 1), flat(expected, 1))
    for name, value in cold.model.state_dict().items():
        assert torch.equal(value, warm.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sequence_schedule": [[0.5, 1024], [0.5, 2048]]}, "expected them to increase"),
        ({"sequence_schedule": [[0.5, 1000]]}, "1000 does not divide train.sequence_tokens 2048"),
        (
            {"sequence_schedule": [[1.5, 1024]]},
            "sequence_schedule.0.0: found 1.5, expected at most 1",
        ),
        ({"warmdown_fraction": 0.5}, "set one of them and make the other null"),
        ({"warmdown_steps": None}, "set one of them and make the other null"),
        ({"minimum_learning_rate_fraction": 0.2}, "late QAT would never begin"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        validated(TrainSettings, changes, "train")


def test_recurrence_from_a_share_needs_a_model_that_recurs():
    SCHEDULED.check_with({"model": RECURRENT})
    PLAIN.check_with({"model": SMALL})
    with pytest.raises(UserError, match="recurrence_from is 0.4, but model.recurrence_passes is 1"):
        SCHEDULED.check_with({"model": SMALL})


@pytest.mark.slow
def test_a_compiled_loss_follows_the_switch():
    config = SMALL.changed(layers=2, value_layers=(), recurrent_layers=(1,), recurrence_passes=2)
    model = GPT(config, seed=0)
    model.mlp_down_bank.data.fill_(0.1)  # at first no block adds anything
    tokens = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.loss, dynamic=False, backend="eager")
    losses = []
    for recurs in (False, True, False):
        model.recurs = recurs
        losses.append(compiled(tokens[:, :-1], tokens[:, 1:]).item())
        assert losses[-1] == model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert losses[0] == losses[2] != losses[1]
