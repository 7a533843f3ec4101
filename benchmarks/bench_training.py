"""Benchmarks of train, of the optimizer inside it, and of ttt."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch
from baseline import bank_gradients, baseline_attention
from baseline_training import (
    BaselineAverages,
    BaselineOptimizer,
    BaselineTrainer,
    SequentialBatches,
    baseline_ttt,
    compiled,
)
from ceilings import NOMINAL_FLOPS_PER_SECOND, optimizer_floor_seconds, train_flops_per_token
from context import Context, ran
from results import Agreement, Bar, Row, ratio_of
from timing import Run, alternate, held_bytes, timed, warmed_up

from fairway.data.dataset import read_split
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.spec import BANKS
from fairway.training.averaging import WeightAverages
from fairway.training.trainer import Trainer, TrainSettings
from fairway.training.ttt import TTTSettings, adapt

STEPS_PER_TURN = 4
TTT_STEPS = 8
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""‖difference‖ / ‖gradient‖ of a bank: two bfloat16 backward passes of the same function."""


def train(context: Context) -> list[Row]:
    """Whole steps: data, forward and backward passes, optimizer, averages."""
    settings, device = context.train_settings(), context.device
    held = held_bytes(device)
    trainer = context.trainer(context.model(), settings)
    sides = {"fast": warmed_up(device, lambda: _fast_steps(trainer), held)}
    if context.has_baseline:
        sides["baseline"] = warmed_up(device, lambda: _baseline_steps(context, settings))
    seconds = alternate(sides, context.options.repeats)
    context.step_seconds = seconds["fast"]
    peaks = {f"{name}_peak_bytes": side.peak_bytes for name, side in sides.items()}
    del sides
    agreements = _gradients_agree(context, trainer)
    rates = {name: settings.batch_tokens / value for name, value in seconds.items()}
    ratio = ratio_of(rates)
    flops = train_flops_per_token(trainer.model.config)
    utilization = {
        name: flops * rate / NOMINAL_FLOPS_PER_SECOND for name, rate in rates.items()
    }  # fmt: skip
    share = flops * rates["fast"] / context.ceilings.matmul_flops_per_second
    about = ran(trainer.model)
    return [
        Row(
            "train", "tokens/s", rates["fast"], rates.get("baseline"), ratio, "matmul", share,
            **peaks, **about, agreements=agreements,
            bars=(
                Bar(">= 1.5x the baseline", ratio is not None and ratio >= 1.5),
                Bar(">= 1.6 M tokens/s", rates["fast"] >= 1.6e6),
            ),
            note=f"{settings.batch_tokens:,} tokens a step, micro-batches of "
            f"{settings.micro_batch_sequences} sequences (baseline: 8 micro-batches)",
        ),
        Row(
            "train", "MFU of nominal 989 TFLOP/s", utilization["fast"],
            utilization.get("baseline"), ratio, **about,
            note=f"{flops / 1e9:.3f} GFLOP a token",
        ),
    ]  # fmt: skip


def _fast_steps(trainer: Trainer) -> Run:
    """Turns of the library's training loop, timed by its own training clock."""

    def run() -> list[float]:
        done = len(trainer.progress.history)
        steps = trainer.progress.step + STEPS_PER_TURN
        trainer.settings = trainer.settings.changed(max_steps=steps)
        trainer.run()
        clock = [0.0, *(row["seconds"] for row in trainer.progress.history)]
        return [after - before for before, after in pairwise(clock[done:])]

    return run


def _baseline_steps(context: Context, settings: TrainSettings) -> Run:
    spans = context.dataset.splits["train"]
    trainer = BaselineTrainer(context.baseline(), settings, spans, context.compiles_baseline)
    return lambda: [timed(context.device, trainer.step) for _ in range(STEPS_PER_TURN)]


def _gradients_agree(context: Context, trainer: Trainer) -> tuple[Agreement, ...]:
    """Loss and gradients of one micro-batch: as the trainer computes it, and the baseline's.

    The baseline runs eagerly here, a sequence at a time, which is the same function in less memory;
    where the model is not the submission's, the plain formulation does so.
    """
    weights, rows = context.scattered_weights(), trainer.settings.micro_batch_sequences
    batches = SequentialBatches(context.dataset.splits["train"], context.device)
    inputs, targets = batches.next(rows, trainer.settings.sequence_tokens)
    trainer.model.load_state_dict(weights)
    fast_loss = trainer.backward(inputs, targets, 1.0)
    is_baseline, loss = context.has_baseline, 0.0
    baseline = context.baseline(weights) if is_baseline else context.plain(weights)
    with baseline_attention(context.device) if is_baseline else nullcontext():
        for row in range(rows):
            part = baseline.loss(inputs[row : row + 1], targets[row : row + 1]) / rows
            part.backward()
            loss += float(part.detach())
    ours, theirs = bank_gradients(trainer.model), bank_gradients(baseline)
    largest = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in BANKS)
    return (
        context.losses_agree("loss of a micro-batch, nats", abs(float(fast_loss) - loss)),
        Agreement("gradient of a bank, relative", largest, GRADIENT_TOLERANCE[context.precision]),
    )


def optimizer(context: Context) -> list[Row]:
    """Optimizer and averages alone, as a share of the whole step."""
    settings, device = context.train_settings(), context.device
    whole = whole_step_seconds(context)
    sides = {
        "fast": warmed_up(device, lambda: _fast_update(context, settings)),
        "baseline": warmed_up(device, lambda: _baseline_update(context, settings)),
    }
    seconds = alternate(sides, 3 * context.options.repeats)
    floor = optimizer_floor_seconds(
        context.model_config(),
        settings.newton_schulz_steps,
        len(settings.ema_decays),
        context.ceilings,
    )
    peaks = {f"{name}_peak_bytes": side.peak_bytes for name, side in sides.items()}
    share, ratio = seconds["fast"] / whole, seconds["baseline"] / seconds["fast"]
    about = ran(context.model())
    return [
        Row(
            "optimizer", "ms", seconds["fast"] * 1e3, seconds["baseline"] * 1e3, ratio,
            "matmul+memory", floor / seconds["fast"], **peaks, **about,
            note=f"{len(settings.ema_decays)} moving averages (baseline: 1)",
        ),
        Row(
            "optimizer", "share of the step", share, **about,
            bars=(Bar("<= 6 % of the step", share <= 0.06),),
            note=f"of a whole step of {whole:.4g} s in "
            f"{settings.batch_sequences // settings.micro_batch_sequences} micro-batches",
        ),
    ]  # fmt: skip


def whole_step_seconds(context: Context) -> float:
    """The library's training step; measured here where `train` was not run before."""
    if context.step_seconds is None:
        trainer = context.trainer(context.model(), context.train_settings())
        run = _fast_steps(trainer)
        run()
        context.step_seconds = statistics.median(run())
        del trainer, run
        context.clean_up()
    return context.step_seconds


def _fast_update(context: Context, settings: TrainSettings) -> Run:
    trainer = context.trainer(context.model(context.scattered_weights()), settings)
    averages = WeightAverages(
        trainer.model, settings.ema_decays, settings.swa_every_steps, settings.swa_scale
    )
    gradients = _random_gradients(trainer.model, context.options.seed)

    def update() -> None:
        trainer.optimizer.step(1.0, settings.muon_momentum)
        averages.update(0, 1.0)

    return lambda: [_timed_update(context.device, trainer.model, gradients, update)]


def _baseline_update(context: Context, settings: TrainSettings) -> Run:
    model = context.baseline(context.scattered_weights())
    optimizer = BaselineOptimizer(model, settings)
    averages = BaselineAverages(model, settings.ema_decays[:1])
    gradients = _random_gradients(model, context.options.seed)

    def update() -> None:
        optimizer.step()
        averages.update()

    return lambda: [_timed_update(context.device, model, gradients, update)]


def _random_gradients(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(model.query_output_bank.device).manual_seed(seed)
    return {
        name: torch.randn(
            parameter.shape, generator=generator, device=parameter.device
        ) * 1e-4
        for name, parameter in model.named_parameters()
    }  # fmt: skip


def _timed_update(device, model, gradients, update) -> float:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    return timed(device, update)


def ttt(context: Context) -> list[Row]:
    """AdamW epochs on held-out text, the whole function that the stage calls."""
    settings = context.section("ttt").changed(epochs=1)
    length, device = context.section("train").sequence_tokens, context.device
    available = (len(read_split(context.dataset, "adaptation")) - 1) // length
    steps = min(TTT_STEPS, available // settings.batch_sequences)
    if steps == 0:
        raise UserError(
            f"the split adaptation holds {available} sequences, one step of ttt takes "
            f"{settings.batch_sequences}: raise data.adaptation_tokens and rerun tokenize"
        )
    num_tokens = steps * settings.batch_sequences * length
    tokens = read_split(context.dataset, "adaptation")[: num_tokens + 1]
    first_losses: list[float] = []
    held = held_bytes(device)
    model = context.model(context.scattered_weights())
    sides = {
        "fast": warmed_up(
            device,
            lambda: _epochs(context, _fast_ttt(context, model, settings), tokens, first_losses),
            held,
        )
    }
    sides["baseline"] = warmed_up(
        device, lambda: _epochs(context, _baseline_ttt(context, settings), tokens, first_losses)
    )
    seconds = alternate(sides, context.options.repeats)
    rates = {name: num_tokens / value for name, value in seconds.items()}
    ratio = rates["fast"] / rates["baseline"]
    flops = train_flops_per_token(model.config) * rates["fast"]
    difference = abs(first_losses[0] - first_losses[1])
    return [
        Row(
            "ttt", "tokens/s", rates["fast"], rates["baseline"], ratio, "matmul",
            flops / context.ceilings.matmul_flops_per_second,
            **{f"{name}_peak_bytes": side.peak_bytes for name, side in sides.items()},
            **ran(model),
            bars=(Bar(">= 1.3x the baseline", ratio >= 1.3),),
            agreements=(context.losses_agree("mean loss of the first step, nats", difference),),
            note=f"{steps} steps of {settings.batch_sequences} sequences",
        )
    ]  # fmt: skip


Epoch = Callable[[np.ndarray], list[float]]
"""Trains on tokens [n + 1] and returns each epoch's mean loss in nats."""


def _epochs(context: Context, epoch: Epoch, tokens: np.ndarray, first_losses: list[float]) -> Run:
    """Epochs over all of `tokens`, after one step whose loss, before any update, must agree.

    Later losses need not: the reference submission freezes other weights than Fairway does.
    """
    length = context.section("train").sequence_tokens
    step_tokens = context.section("ttt").batch_sequences * length
    first_losses += epoch(tokens[: step_tokens + 1])
    return lambda: [timed(context.device, lambda: epoch(tokens))]


def _fast_ttt(context: Context, model: GPT, settings: TTTSettings) -> Epoch:
    return lambda tokens: adapt(
        model,
        tokens,
        settings,
        seed=context.options.seed,
        world=context.world,
        compile_model=context.compiles(model),
    )


def _baseline_ttt(context: Context, settings: TTTSettings) -> Epoch:
    model = context.baseline(context.scattered_weights())
    loss_function = compiled(model.loss) if context.compiles_baseline else model.loss
    length = model.config.sequence_tokens

    def epoch(tokens: np.ndarray) -> list[float]:
        stream = torch.from_numpy(tokens.astype("int64"))
        sequences = stream[:-1].view(-1, length), stream[1:].view(-1, length)
        return baseline_ttt(model, loss_function, sequences, settings, context.options.seed)

    return epoch
