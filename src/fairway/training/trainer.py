"""The training loop: timed, checkpointed, interruptible, the same on any number of processes."""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from tqdm import tqdm

from fairway.data.loader import CoprimeLoader
from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.progress import progress
from fairway.settings import Settings
from fairway.training.averaging import WeightAverages
from fairway.training.checkpoint import Checkpoints, tensors_under, with_prefix
from fairway.training.gradients import eager_backward, graphed_backward
from fairway.training.optimizers import Optimizer
from fairway.training.schedule import learning_rate_scale, muon_momentum


class TrainSettings(Settings):
    """Training: batches, steps and clock, optimizers, averages, checkpoints."""

    sequence_tokens: int = Field(2048, ge=2)
    """Length of a sequence."""
    batch_tokens: int = Field(786_432, ge=1)
    """Tokens of a step, over all processes."""
    micro_batch_sequences: int = Field(48, ge=1)
    """Sequences of a forward pass, in each process."""
    max_steps: int = Field(20_000, ge=1)
    """Training ends after this step at the latest."""
    max_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """The training clock's end. Null counts steps only, which makes a run repeatable to the bit on
    CPU."""
    warmup_steps: int = Field(20, ge=0)
    """Steps that compile before the clock starts; afterwards everything is reset."""
    warmdown_steps: int = Field(4000, ge=0)
    """Length of the final linear decay of the learning rates; in time where max_seconds binds."""
    matrix_learning_rate: float = Field(0.025, gt=0)
    """Of the matrices inside the network, which Muon trains."""
    embedding_learning_rate: float = Field(0.035, gt=0)
    """Of the embeddings, which AdamW trains."""
    scalar_learning_rate: float = Field(0.025, gt=0)
    """Of all other parameters, which AdamW trains."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.9, 0.95), min_length=2, max_length=2
    )
    """AdamW's decay of the first and the second moment."""
    weight_decay: float = Field(0.04, ge=0)
    """Decoupled, times the learning rate."""
    muon_momentum_start: float = Field(0.92, ge=0, le=1)
    """Muon's momentum at the first step."""
    muon_momentum: float = Field(0.99, ge=0, le=1)
    """Muon's momentum after muon_momentum_warmup_steps."""
    muon_momentum_warmup_steps: int = Field(1500, ge=0)
    """Steps of the linear rise between them."""
    newton_schulz_steps: int = Field(5, ge=1)
    """Iterations by which Muon orthogonalizes an update."""
    gradient_clip: float = Field(0.3, gt=0)
    """Largest norm of the gradient of all parameters together."""
    late_qat_scale: float = Field(0.15, ge=0, le=1)
    """Quantization-aware training begins once the learning-rate scale falls under this; 0 never."""
    ema_decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.997, 0.99, 0.98), min_length=1
    )
    """Decays of the exponential moving averages of the weights, one tracker each."""
    swa_every_steps: int = Field(50, ge=1)
    """Steps between the weights that SWA, a plain mean, takes in."""
    swa_scale: float = Field(0.2, ge=0, le=1)
    """SWA averages while the learning-rate scale is under this."""
    checkpoint_seconds: float = Field(60.0, gt=0)
    """Time between mid-run checkpoints."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between the rows of metrics.parquet."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_tokens % self.sequence_tokens:
            raise UserError(
                f"train.sequence_tokens {self.sequence_tokens} does not divide "
                f"train.batch_tokens {self.batch_tokens}"
            )
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise UserError(
                f"train.ema_decays: found {list(self.ema_decays)}, expected each entry once"
            )
        return self

    @property
    def batch_sequences(self) -> int:
        """Sequences of a step, over all processes."""
        return self.batch_tokens // self.sequence_tokens


CURVE = ("step", "loss", "lr_scale", "seconds", "tokens")
"""Columns of metrics.parquet. A checkpoint keeps its rows, but no order of keys."""


@dataclass
class Progress:
    """What a checkpoint must carry besides tensors."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """The training clock; warm-up, checkpoints' writing and interruptions do not count."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Rows of metrics.parquet, with CURVE's columns."""


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C arrived, and a checkpoint was written."""


def optimizer_of(
    model: GPT, settings: TrainSettings, rank: int = 0, world_size: int = 1
) -> Optimizer:
    """The optimizer that a training with `settings` steps `model` with."""
    return Optimizer(
        model,
        learning_rates={
            "matrix": settings.matrix_learning_rate,
            "embedding": settings.embedding_learning_rate,
            "scalar": settings.scalar_learning_rate,
        },
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        newton_schulz_steps=settings.newton_schulz_steps,
        gradient_clip=settings.gradient_clip,
        rank=rank,
        world_size=world_size,
    )


class Trainer:
    """Trains `model` in place; `run` returns once the step or time budget is used up.

    fake_quantize: from a bank's name and value [N, R, C] to its straight-through quantized values,
    for late QAT.
    Every process of `world` must call the same methods in the same order.
    """

    def __init__(
        self,
        model: GPT,
        settings: TrainSettings,
        loader: CoprimeLoader,
        world: World,
        checkpoints: Checkpoints,
        *,
        fake_quantize: Callable[[str, torch.Tensor], torch.Tensor],
        compile_model: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.settings, self.loader = model, settings, loader
        self.world, self.checkpoints = world, checkpoints
        self.fake_quantize = fake_quantize
        self.optimizer = optimizer_of(model, settings, world.rank, world.size)
        self.averages = WeightAverages(
            model, settings.ema_decays, settings.swa_every_steps, settings.swa_scale
        )
        self.progress = Progress()
        self.batch: tuple | None = None
        self.loader_state = loader.state()
        loss = torch.compile(model.loss, dynamic=False) if compile_model else model.loss
        self.cuda_graphs = cuda_graphs
        self.backward = graphed_backward(model) if cuda_graphs else eager_backward(loss)
        self.signal_number = 0

    def describe(self) -> str:
        """One line for the log: the model's size, what computes it, and the tokens of a step."""
        model, settings, world = self.model, self.settings, self.world
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return (
            f"{parameters:,} parameters on {world.size} × {world.device}, {model.compute_dtype}, "
            f"attention {model.attention_backend}; {settings.batch_tokens:,} tokens a step "
            f"({settings.batch_sequences} sequences of {settings.sequence_tokens})"
        )

    def run(self) -> Progress:
        """Warm up, resume from the newest checkpoint if there is one, train to the end."""
        self._warm_up()
        self._resume()
        previous = {
            number: signal.signal(number, self._note_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._train()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.model.fake_quantize = None
        return self.progress

    def _note_signal(self, number: int, frame: object) -> None:
        self.signal_number = number

    def _train(self) -> None:
        settings, state = self.settings, self.progress
        last_saved = time.monotonic()
        with progress(
            settings.max_steps, "train", "step", initial=state.step, show=self.world.is_main
        ) as bar:
            while not self._is_finished():
                started = time.perf_counter()
                scale = self._learning_rate_scale()
                loss = self._step(state.step, scale)
                self.averages.update(state.step, scale)
                due = time.monotonic() - last_saved > settings.checkpoint_seconds
                loss, seconds, save, stop = self._agree(
                    loss(), lambda began=started: time.perf_counter() - began, due
                )
                self._check_finite(loss)
                state.step += 1
                state.seconds += seconds
                self._log(bar, loss, scale)
                if save or stop:
                    self._save()
                    last_saved = time.monotonic()
                if stop:
                    raise Interrupted(128 + int(stop))

    def _is_finished(self) -> bool:
        limit = self.settings.max_seconds
        return self.progress.step >= self.settings.max_steps or (
            limit is not None and self.progress.seconds >= limit
        )

    def _learning_rate_scale(self) -> float:
        return learning_rate_scale(
            self.progress.step,
            self.progress.seconds,
            max_steps=self.settings.max_steps,
            max_seconds=self.settings.max_seconds,
            warmdown_steps=self.settings.warmdown_steps,
        )

    def _step(self, step: int, scale: float) -> Callable[[], float]:
        """Launch one optimizer step; return a callable that waits for this process's mean loss.

        The callable does not wait for the update, so the GPU has work while the next step is
        launched.
        """
        settings = self.settings
        late = scale < settings.late_qat_scale
        self.model.fake_quantize = self.fake_quantize if late else None
        loss = _to_host(self._accumulate_gradients(*(self.batch or self._next_batch())))
        momentum = muon_momentum(
            step,
            start=settings.muon_momentum_start,
            end=settings.muon_momentum,
            warmup_steps=settings.muon_momentum_warmup_steps,
        )
        self.optimizer.step(scale, momentum)
        self._prefetch()
        return loss

    def _prefetch(self) -> None:
        """Gather the next batch now, while the GPU still works on this one."""
        self.loader_state = self.loader.state()
        self.batch = self._next_batch()

    def _next_batch(self) -> tuple[torch.Tensor, ...]:
        """inputs and targets, int64 [sequences, T], on the device."""
        return tuple(_to_device(part, self.world.device) for part in self.loader.next_batch())

    def _rewind_loader(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)
        self.loader_state, self.batch = state, None

    def _accumulate_gradients(self, inputs, targets) -> torch.Tensor:
        rows = self.settings.micro_batch_sequences
        total = torch.zeros((), device=self.world.device)
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            total += self.backward(x, y, len(x) / len(inputs))
        return total

    def _agree(
        self, loss: float, seconds: Callable[[], float], due: bool
    ) -> tuple[float, float, bool, float]:
        """Loss averaged over processes, and what the first process decides for all."""
        if self.world.size == 1:
            return loss, seconds(), due, self.signal_number
        main = float(self.world.is_main)
        decisions = torch.tensor([0.0, 0.0, main * due, main * self.signal_number])
        decisions[0] = loss / self.world.size
        decisions[1] = main * seconds()
        dist.all_reduce(decisions)  # on the host: the GPUs are still at work
        mean, elapsed, save, stop = decisions.tolist()
        return mean, elapsed, bool(save), stop

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"training loss is {loss} at step {self.progress.step + 1}: lower the learning "
                "rates of `train` or its gradient_clip"
            )

    def _log(self, bar: tqdm, loss: float, scale: float) -> None:
        settings, state = self.settings, self.progress
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{scale:.2f}", refresh=False)
        bar.update(1)
        if state.step % settings.log_every_steps == 0 or state.step == 1 or self._is_finished():
            row = {"step": state.step, "loss": loss, "lr_scale": scale, "seconds": state.seconds}
            state.history.append({**row, "tokens": state.step * settings.batch_tokens})

    def _warm_up(self) -> None:
        """Steps that only compile, with and without late QAT; then everything is as before them."""
        steps = self.settings.warmup_steps
        if steps == 0:
            return
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        loader_state = self.loader_state
        for step in range(steps):
            late = step >= steps // 2 and self.settings.late_qat_scale > 0
            self._step(step, scale=self.settings.late_qat_scale / 2 if late else 1.0)()
        self.model.load_state_dict(weights)
        self.optimizer.load_state_tensors({})
        self.averages.reset()
        self._rewind_loader(loader_state)

    def _save(self) -> None:
        optimizer_state = self.optimizer.state_tensors()
        if not self.world.is_main:
            return
        tensors = {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("optimizer", optimizer_state),
            **with_prefix("average", self.averages.state_tensors()),
        }
        state: dict[str, Any] = {
            "seconds": self.progress.seconds,
            "history": self.progress.history,
            "loader": self.loader_state,
            "swa_count": self.averages.swa_count,
        }
        folder = self.checkpoints.save(self.progress.step, tensors, state)
        print(f"checkpoint of step {self.progress.step}: {folder}", file=sys.stderr, flush=True)

    def _resume(self) -> None:
        found = self.checkpoints.load_latest()
        if found is None:
            return
        tensors, state = found
        self.model.load_state_dict(tensors_under(tensors, "model"))
        self.optimizer.load_state_tensors(tensors_under(tensors, "optimizer"))
        self.averages.load_state_tensors(tensors_under(tensors, "average"), state["swa_count"])
        self._rewind_loader(state["loader"])
        self.progress = Progress(state["step"], state["seconds"], state["history"])
        if self.world.is_main:
            print(f"resumed after step {state['step']}", file=sys.stderr, flush=True)


def check_batch(settings: TrainSettings, world_size: int) -> None:
    """UserError where a step's sequences cannot be shared out evenly."""
    if settings.batch_sequences % world_size:
        raise UserError(
            f"train.batch_tokens {settings.batch_tokens} is {settings.batch_sequences} sequences, "
            f"which {world_size} processes do not divide: change one of them"
        )
    mine = settings.batch_sequences // world_size
    if mine > settings.micro_batch_sequences and mine % settings.micro_batch_sequences:
        raise UserError(
            f"train.micro_batch_sequences {settings.micro_batch_sequences} does not divide the "
            f"{mine} sequences that each of {world_size} processes takes a step"
        )


def _to_device(array, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _to_host(value: torch.Tensor) -> Callable[[], float]:
    """Start the copy of a scalar; the callable waits for it, and for nothing launched later."""
    if not value.is_cuda:
        return lambda: float(value)
    copy = torch.empty((), pin_memory=True).copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> float:
        copied.synchronize()
        return float(copy)

    return wait
