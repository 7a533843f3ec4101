"""The training loop: timed, checkpointed, interruptible, the same on any number of processes."""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from fairway.data.loader import CoprimeLoader
from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.progress import progress
from fairway.quantization.integers import fake_quantize_int6
from fairway.training.averaging import WeightAverages
from fairway.training.checkpoint import Checkpoints
from fairway.training.gradients import launched, replayed
from fairway.training.optimizers import Optimizer
from fairway.training.schedule import learning_rate_scale, muon_momentum


@dataclass(frozen=True)
class TrainSettings:
    """The config section `train`; workflow/schemas/config.schema.yaml describes each key."""

    sequence_tokens: int
    batch_tokens: int
    micro_batch_sequences: int
    max_steps: int
    max_seconds: float | None
    warmup_steps: int
    warmdown_steps: int
    matrix_learning_rate: float
    embedding_learning_rate: float
    scalar_learning_rate: float
    adam_betas: list[float]
    weight_decay: float
    muon_momentum_start: float
    muon_momentum: float
    muon_momentum_warmup_steps: int
    newton_schulz_steps: int
    gradient_clip: float
    late_qat_scale: float
    ema_decays: list[float]
    swa_every_steps: int
    swa_scale: float
    checkpoint_seconds: float
    log_every_steps: int

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.sequence_tokens


@dataclass
class Progress:
    """What a checkpoint must carry besides tensors."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """The training clock; warm-up, checkpoints' writing and interruptions do not count."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Rows of metrics.parquet: step, loss, lr_scale, seconds, tokens."""


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C arrived, and a checkpoint was written."""


class Trainer:
    """Trains `model` in place; `run` returns once the step or time budget is used up.

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
        compile_model: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.settings, self.loader = model, settings, loader
        self.world, self.checkpoints = world, checkpoints
        self.optimizer = Optimizer(
            model,
            learning_rates={
                "matrix": settings.matrix_learning_rate,
                "embedding": settings.embedding_learning_rate,
                "scalar": settings.scalar_learning_rate,
            },
            betas=tuple(settings.adam_betas),
            weight_decay=settings.weight_decay,
            newton_schulz_steps=settings.newton_schulz_steps,
            gradient_clip=settings.gradient_clip,
            rank=world.rank,
            world_size=world.size,
        )
        self.averages = WeightAverages(
            model, settings.ema_decays, settings.swa_every_steps, settings.swa_scale
        )
        self.progress = Progress()
        self.batch: tuple | None = None
        self.loader_state = loader.state()
        loss = torch.compile(model.loss, dynamic=False) if compile_model else model.loss
        self.cuda_graphs = cuda_graphs
        self.backward = replayed(model) if cuda_graphs else launched(loss)
        self.signal_number = 0

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
        self.model.matrix_transform = None
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
        """Launch one optimiser step; returns what waits for this process's mean loss, and gives it.

        It does not wait for the update, so that the GPU has work while the next step is launched.
        """
        settings = self.settings
        late = scale < settings.late_qat_scale
        self.model.matrix_transform = fake_quantize_int6 if late else None
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
        """Gather the next batch now, while the GPU is still at work on what was launched."""
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
                f"rates of `train` or its gradient_clip; {self.checkpoints.describe_latest()}"
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
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"optimizer.{name}": value for name, value in optimizer_state.items()},
            **{f"average.{name}": value for name, value in self.averages.state_tensors().items()},
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
        self.model.load_state_dict(_under(tensors, "model."))
        self.optimizer.load_state_tensors(_under(tensors, "optimizer."))
        self.averages.load_state_tensors(_under(tensors, "average."), state["swa_count"])
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
    """Start the copy of a scalar; the result waits for it, and for nothing launched after it."""
    if not value.is_cuda:
        return lambda: float(value)
    copy = torch.empty((), pin_memory=True).copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> float:
        copied.synchronize()
        return float(copy)

    return wait


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
