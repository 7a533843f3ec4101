"""The training loop: timed, checkpointed, interruptible, the same on any number of processes."""

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from tqdm import tqdm

from fairway.data.loader import CoprimeLoader
from fairway.distributed import World
from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.phases import phase
from fairway.progress import progress
from fairway.settings import Settings
from fairway.training.averaging import WeightAverages
from fairway.training.checkpoint import Checkpoints, tensors_under, with_prefix
from fairway.training.curve import CurveFile
from fairway.training.gradients import eager_backward, graphed_backward
from fairway.training.optimizers import GROUPS, Optimizer
from fairway.training.schedule import (
    learning_rate_scale,
    muon_momentum,
    sequence_length,
    training_progress,
)


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
    warmup_steps: int = Field(5, ge=0)
    """Steps that compile before the clock starts; afterwards everything is reset."""
    warmdown_steps: Annotated[int, Field(ge=0)] | None = 4000
    """Length of the final linear decay of the learning rates; in time where max_seconds binds. Null
    where warmdown_fraction says it."""
    warmdown_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Length of the decay as a share of the budget: of max_seconds or of max_steps, whichever ends
    the training. It takes the place of warmdown_steps, which is then null."""
    minimum_learning_rate_fraction: float = Field(0.0, ge=0, le=1)
    """Of the learning rates, under which the decay does not go."""
    sequence_schedule: tuple[
        tuple[Annotated[float, Field(gt=0, le=1)], Annotated[int, Field(ge=2)]], ...
    ] = ()
    """Shorter sequences at first: pairs of a share of the budget and of the length until then, such
    as [[0.1, 1024]]; afterwards the length is sequence_tokens. A length divides sequence_tokens:
    each sequence of the loader is cut into parts of that length, so a step has as many tokens."""
    recurrence_from: float = Field(0.0, ge=0, lt=1)
    """Share of the budget from which on model.recurrent_layers run more than once; before, each
    block runs once."""
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
    """Decoupled, times the learning rate. Of every group whose own key is null."""
    matrix_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of the matrices inside the network."""
    embedding_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of the embeddings."""
    scalar_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of all other parameters."""
    muon_momentum_start: float = Field(0.92, ge=0, le=1)
    """Muon's momentum at the first step."""
    muon_momentum: float = Field(0.99, ge=0, le=1)
    """Muon's momentum after muon_momentum_warmup_steps."""
    muon_momentum_warmup_steps: int = Field(1500, ge=0)
    """Steps of the linear rise between them."""
    newton_schulz_steps: int = Field(5, ge=1)
    """Iterations by which Muon orthogonalizes an update."""
    muon_coefficients: Literal["jordan", "polar_express"] = "jordan"
    """Polynomials of these iterations: one for all (Jordan et al.), or the best for each (The Polar
    Express, arXiv:2505.16932; a sixth and further iterations repeat the fifth)."""
    muon_row_normalize: bool = False
    """Whether each row of a matrix's update is divided by its L2 norm before (MuonEq-R)."""
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
    held_out_seconds: Annotated[float, Field(gt=0)] | None = 120.0
    """Time on the training clock between measurements of the bits per byte of held-out training
    text, for which the clock stands still. Null: none."""
    held_out_tokens: int = Field(131_072, ge=2)
    """Of that text, the first of data.selection_tokens, at most."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_tokens % self.sequence_tokens:
            raise UserError(
                f"train.sequence_tokens {self.sequence_tokens} does not divide "
                f"train.batch_tokens {self.batch_tokens}"
            )
        if (self.warmdown_steps is None) == (self.warmdown_fraction is None):
            raise UserError(
                f"train.warmdown_steps {self.warmdown_steps} and train.warmdown_fraction "
                f"{self.warmdown_fraction}: set one of them and make the other null"
            )
        self._check_sequence_schedule()
        if 0 < self.late_qat_scale <= self.minimum_learning_rate_fraction:
            raise UserError(
                f"train.late_qat_scale {self.late_qat_scale} is not above "
                f"train.minimum_learning_rate_fraction {self.minimum_learning_rate_fraction}, so "
                "late QAT would never begin: raise it, or set it to 0"
            )
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise UserError(
                f"train.ema_decays: found {list(self.ema_decays)}, expected each entry once"
            )
        return self

    def _check_sequence_schedule(self) -> None:
        ends = [until for until, _ in self.sequence_schedule]
        if ends != sorted(set(ends)):
            raise UserError(
                f"train.sequence_schedule: found the shares {ends}, expected them to increase"
            )
        for _, tokens in self.sequence_schedule:
            if self.sequence_tokens % tokens:
                raise UserError(
                    f"train.sequence_schedule: the length {tokens} does not divide "
                    f"train.sequence_tokens {self.sequence_tokens}"
                )

    def check_with(self, sections: Mapping[str, Settings]) -> None:
        """Raise UserError where blocks shall run again later, in a model where none ever does."""
        if self.recurrence_from > 0 and sections["model"].recurrence_passes == 1:
            raise UserError(
                f"train.recurrence_from is {self.recurrence_from}, but model.recurrence_passes is "
                "1: raise the passes, or set it to 0"
            )

    @property
    def batch_sequences(self) -> int:
        """Sequences of a step, over all processes."""
        return self.batch_tokens // self.sequence_tokens

    def weight_decay_of(self, group: str) -> float:
        """Of a group of parameters: its own key, or where that is null the common one."""
        own = getattr(self, f"{group}_weight_decay")
        return self.weight_decay if own is None else own


class Form(NamedTuple):
    """What differs between the steps of a training, and is compiled for each."""

    sequence_tokens: int
    """Length into which the loader's sequences are cut."""
    recurs: bool
    """Whether the model's recurrent blocks run more than once."""
    late_qat: bool


@dataclass
class Progress:
    """What a checkpoint must carry besides tensors."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """The training clock; warm-up, held-out text, checkpoints' writing and interruptions do not
    count."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Rows of metrics.parquet. A checkpoint keeps them, but no order of keys."""


def optimizer_of(
    model: GPT, settings: TrainSettings, rank: int = 0, world_size: int = 1
) -> Optimizer:
    """The optimizer that a training with `settings` steps `model` with."""
    return Optimizer(
        model,
        learning_rates={group: getattr(settings, f"{group}_learning_rate") for group in GROUPS},
        betas=settings.adam_betas,
        weight_decays={group: settings.weight_decay_of(group) for group in GROUPS},
        newton_schulz_steps=settings.newton_schulz_steps,
        muon_coefficients=settings.muon_coefficients,
        muon_row_normalize=settings.muon_row_normalize,
        gradient_clip=settings.gradient_clip,
        rank=rank,
        world_size=world_size,
    )


class Trainer:
    """Trains `model` in place; `run` returns once the step or time budget is used up.

    fake_quantize: from a bank's name and value [N, R, C] to its straight-through quantized values,
    for late QAT. held_out_bpb: the present bits per byte of held-out training text; called in the
    first process, where settings.held_out_seconds asks for it. curve_file: where rows go at once.
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
        held_out_bpb: Callable[[], float] | None = None,
        curve_file: CurveFile | None = None,
        compile_model: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.settings, self.loader = model, settings, loader
        self.world, self.checkpoints = world, checkpoints
        self.fake_quantize = fake_quantize
        self.held_out_bpb, self.curve_file = held_out_bpb, curve_file
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
        file = self.curve_file
        try:
            with file.appending(self.progress.history) if file else nullcontext():
                self._train()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.model.fake_quantize, self.model.recurs = None, True
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
                loss = self._step(state.step, scale, self._form(scale))
                self.averages.update(state.step, scale)
                due = time.monotonic() - last_saved > settings.checkpoint_seconds
                loss, seconds, save, stop = self._agree(
                    loss(), lambda began=started: time.perf_counter() - began, due
                )
                self._check_finite("training loss", loss, state.step + 1)
                state.step += 1
                state.seconds += seconds
                self._log(bar, loss, scale, self._measure_held_out(state.seconds - seconds))
                if save or stop:
                    self._save()
                    last_saved = time.monotonic()
                if stop:
                    raise SystemExit(128 + int(stop))

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
            warmdown_fraction=self.settings.warmdown_fraction,
            minimum=self.settings.minimum_learning_rate_fraction,
        )

    def _form(self, scale: float) -> Form:
        """Of the next step, from the progress that checkpoints hold."""
        settings = self.settings
        progress = training_progress(
            self.progress.step,
            self.progress.seconds,
            max_steps=settings.max_steps,
            max_seconds=settings.max_seconds,
        )
        return self._form_at(progress, late_qat=scale < settings.late_qat_scale)

    def _form_at(self, progress: float, late_qat: bool = False) -> Form:
        settings = self.settings
        return Form(
            sequence_length(progress, settings.sequence_schedule, settings.sequence_tokens),
            progress >= settings.recurrence_from,
            late_qat,
        )

    def _step(self, step: int, scale: float, form: Form) -> Callable[[], float]:
        """Launch one optimizer step; return a callable that waits for this process's mean loss.

        The callable does not wait for the update, so the GPU has work while the next step is
        launched.
        """
        settings = self.settings
        self.model.fake_quantize = self.fake_quantize if form.late_qat else None
        self.model.recurs = form.recurs
        batch = (part.view(-1, form.sequence_tokens) for part in self.batch or self._next_batch())
        loss = _to_host(self._accumulate_gradients(*batch))
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
        settings = self.settings
        tokens = settings.micro_batch_sequences * settings.sequence_tokens
        rows = tokens // inputs.shape[1]
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

    def _measure_held_out(self, seconds_before: float) -> float | None:
        """Bits per byte where this step took the clock past a multiple of held_out_seconds.

        In the first process only, whose clock counts: the others wait within their next step.
        """
        every, seconds = self.settings.held_out_seconds, self.progress.seconds
        is_due = every is not None and seconds_before // every < seconds // every
        if not is_due or self.held_out_bpb is None or not self.world.is_main:
            return None
        self.model.fake_quantize = None  # the weights as they are; each step sets its own form
        bpb = self.held_out_bpb()
        self._check_finite("held-out bpb", bpb, self.progress.step)
        print(f"held-out bpb of step {self.progress.step}: {bpb:.4f}", file=sys.stderr, flush=True)
        return bpb

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"{what} is {value} at step {step}: lower the learning rates of `train` or its "
                "gradient_clip"
            )

    def _log(self, bar: tqdm, loss: float, scale: float, held_out_bpb: float | None) -> None:
        settings, state = self.settings, self.progress
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{scale:.2f}", refresh=False)
        bar.update(1)
        is_due = state.step % settings.log_every_steps == 0 or state.step == 1
        if is_due or held_out_bpb is not None or self._is_finished():
            row = {"step": state.step, "loss": loss, "lr_scale": scale, "seconds": state.seconds}
            row["tokens"] = state.step * settings.batch_tokens
            if held_out_bpb is not None:
                row["held_out_bpb"] = held_out_bpb
            state.history.append(row)
            if self.curve_file:
                self.curve_file.append(row)

    @phase("compile")
    def _warm_up(self) -> None:
        """Steps that only compile each form; then everything is as before them."""
        if self.settings.warmup_steps == 0:
            return
        forms = self._forms()
        steps = max(self.settings.warmup_steps, len(forms))
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        loader_state = self.loader_state
        for step in range(steps):
            self._step(step, 1.0, forms[step * len(forms) // steps])()
        self.model.load_state_dict(weights)
        self.optimizer.load_state_tensors({})
        self.averages.reset()
        self._rewind_loader(loader_state)

    def _forms(self) -> list[Form]:
        """Those that the schedules will come to. Late QAT is expected at the end only: wherever
        else it begins, the clock runs while it compiles."""
        settings = self.settings
        changes = sorted(
            {0.0, settings.recurrence_from, *(e for e, _ in settings.sequence_schedule)}
        )
        forms = list(dict.fromkeys(self._form_at(progress) for progress in changes if progress < 1))
        if settings.late_qat_scale > 0:
            forms.append(forms[-1]._replace(late_qat=True))
        return forms

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
