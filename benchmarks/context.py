"""What every stage's benchmark needs: settings, data, models with weights worth measuring on."""

import argparse
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from baseline import BaselineGPT, from_fairway, is_submission
from ceilings import Ceilings
from results import Agreement
from timing import release_memory

from fairway.data.dataset import Dataset, load_dataset, read_split
from fairway.data.loader import CoprimeLoader
from fairway.distributed import World, resolve_device
from fairway.errors import UserError
from fairway.evaluation.adapters.slot import SlotSettings
from fairway.evaluation.settings import EvaluationSettings
from fairway.model.gpt import GPT
from fairway.model.runtime import captures_graphs, compiles, prepare
from fairway.model.settings import RuntimeSettings
from fairway.model.spec import GPTConfig
from fairway.plugins import search_beside
from fairway.quantization.settings import quantizer_of
from fairway.recipe import Config, complete, read_yaml
from fairway.settings import Settings, merge
from fairway.training.checkpoint import Checkpoints
from fairway.training.trainer import Trainer, TrainSettings

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("quickstart", "pr1350", "frontier")
"""Recipes: a toy, the reference submission's, and the largest."""

UNHURRIED_SECONDS = 1e9
"""Between checkpoints: none is ever written."""

PRETRAINING_TOKENS = 131072
"""Of each step that makes the weights of the stages that need a model which predicts something."""

LOSS_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
"""In nats, on means over at least a window's scored slice (64 targets at the submission's size)."""


@dataclass
class Context:
    """One run of the benchmarks."""

    options: argparse.Namespace
    config: Config
    dataset: Dataset
    device: torch.device
    ceilings: Ceilings | None = None
    step_seconds: float | None = None
    """Of the library's own training step, once it was measured."""
    trained: dict[str, torch.Tensor] | None = None

    @cached_property
    def runtime(self) -> RuntimeSettings:
        """The config's, for the device that was chosen."""
        return self.section("runtime").changed(device=self.device.type)

    @property
    def compiles_baseline(self) -> bool:
        """The submission compiles wherever there is a GPU."""
        return self.runtime.compile != "off" and (
            self.runtime.compile == "on" or self.device.type == "cuda"
        )

    def compiles(self, model: GPT) -> bool:
        """As the library decides it for its own model."""
        return compiles(self.runtime, model)

    @property
    def world(self) -> World:
        return World(rank=0, size=1, device=self.device)

    def section(self, name: str, variant: str = "causal") -> Any:
        """A section's settings as `variant` has them; of the first variant where it is unknown."""
        variants = self.config.variants
        return self.config.sections(variant if variant in variants else next(iter(variants)))[name]

    def train_settings(self, **changes: Any) -> TrainSettings:
        """The config's training without its ends: no clock, no late QAT, no checkpoints.

        Nor its beginning: sequences have their full length, and blocks recur from the first step.
        """
        settings = self.section("train")
        rows = self.options.micro_batch_sequences or settings.micro_batch_sequences
        endless = {
            "micro_batch_sequences": rows,
            "max_seconds": None,
            "warmup_steps": 0,
            "warmdown_steps": 0,
            "warmdown_fraction": None,
            "sequence_schedule": (),
            "recurrence_from": 0.0,
            "late_qat_scale": 0.0,
            "checkpoint_seconds": UNHURRIED_SECONDS,
            "log_every_steps": 1,
        }
        return settings.changed(**{**endless, **changes})

    def model_config(self) -> GPTConfig:
        return model_config(self.section("model"), self.section("train"), self.dataset.vocab_size)

    def model(self, weights: dict[str, torch.Tensor] | None = None) -> GPT:
        """The library's model as its stages prepare it; freshly initialized without `weights`."""
        model = GPT(self.model_config(), seed=self.options.seed)
        if weights is not None:
            model.load_state_dict(weights)
        return prepare(model.to(self.device), self.runtime)

    def baseline(self, weights: dict[str, torch.Tensor] | None = None) -> BaselineGPT:
        """The submission's model with the same weights."""
        return from_fairway(self.model(weights))

    @property
    def has_baseline(self) -> bool:
        """Whether the model is the submission's, up to its sizes."""
        return is_submission(self.model_config())

    def plain(self, weights: dict[str, torch.Tensor]) -> GPT:
        """The plain formulation, not compiled, which fast ways agree with where nothing else is."""
        runtime = self.runtime.changed(kernels="plain", attention="sdpa", cuda_graphs="auto")
        return prepare(self.model(weights), runtime)

    def scattered_weights(self) -> dict[str, torch.Tensor]:
        """Initial weights plus noise: at the true start whole layers are zero and hide errors."""
        generator = torch.Generator().manual_seed(self.options.seed)
        initial = GPT(self.model_config(), seed=self.options.seed).state_dict()
        return {
            name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in initial.items()
        }

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Weights of a model that predicts something, on the CPU; trained once a run, untimed."""
        if self.trained is None:
            steps = self.options.train_steps
            say(f"training {steps} steps for the stages that need a model which predicts something")
            self.trained = self._pretrain(steps) if steps else self.scattered_weights()
        return self.trained

    def _pretrain(self, steps: int) -> dict[str, torch.Tensor]:
        whole = self.train_settings()
        tokens = min(PRETRAINING_TOKENS, whole.batch_tokens)
        sequences = max(1, tokens // whole.sequence_tokens)
        settings = whole.changed(
            batch_tokens=sequences * whole.sequence_tokens,
            # The shape that TTT compiles for as well.
            micro_batch_sequences=math.gcd(sequences, self.section("ttt").batch_sequences),
            max_steps=steps,
            warmdown_steps=steps // 2,
            log_every_steps=steps,
        )
        trainer = self.trainer(self.model(), settings)
        trainer.run()
        weights = {name: value.cpu().clone() for name, value in trainer.model.state_dict().items()}
        del trainer
        self.clean_up()
        return weights

    def trainer(self, model: GPT, settings: TrainSettings) -> Trainer:
        """The library's own training loop."""
        loader = CoprimeLoader(
            self.dataset.splits["train"],
            settings.sequence_tokens,
            settings.batch_sequences,
            seed=self.options.seed,
        )
        # Nothing is ever written there: UNHURRIED_SECONDS lie between checkpoints.
        checkpoints = Checkpoints(Path(tempfile.gettempdir()) / "fairway-benchmark", "none")
        return Trainer(
            model,
            settings,
            loader,
            self.world,
            checkpoints,
            fake_quantize=quantizer_of(self.section("gptq")).fake,
            compile_model=self.compiles(model),
            cuda_graphs=captures_graphs(self.runtime, model),
        )

    def stream(self, split: str, num_tokens: int | None = None) -> torch.Tensor:
        """The first tokens of a split, int64 on the device; all without `num_tokens`."""
        tokens = read_split(self.dataset, split)[:num_tokens]
        if num_tokens is not None and len(tokens) < num_tokens:
            raise UserError(
                f"the split {split} has {len(tokens)} tokens and {num_tokens} are needed: bring a "
                "larger dataset, or lower --windows"
            )
        return torch.from_numpy(tokens.astype("int64")).to(self.device)

    def clean_up(self) -> None:
        """Give back what a stage's deleted models held."""
        release_memory(self.device)

    def losses_agree(self, what: str, difference: float) -> Agreement:
        """Mean losses under the tolerance of the precision that the model computes in."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return Agreement(what, difference, LOSS_TOLERANCE[dtype])

    @property
    def precision(self) -> str:
        """What `prepare` makes of runtime.precision here."""
        if self.runtime.precision != "auto":
            return self.runtime.precision
        return "bfloat16" if self.device.type == "cuda" else "float32"


def make_context(options: argparse.Namespace) -> Context:
    """Read settings and data; UserError where they do not fit together."""
    device = resolve_device(options.device)
    options.size = options.size or ("pr1350" if device.type == "cuda" else "quickstart")
    config = load_recipe(options.size, options.config)
    context = Context(options, config, load_dataset(options.dataset), device)
    if context.compiles_baseline:
        # One process holds every stage's graphs; past the usual 8 a function would run uncompiled.
        torch._dynamo.config.recompile_limit = 64
    return context


def load_recipe(size: str, overlays: Iterable[Path] = ()) -> Config:
    """The recipe of a size with YAML files laid over it, one after the other."""
    values: dict[str, Any] = {"recipe": size, "seeds": [0]}
    for path in overlays:
        search_beside([path.resolve().parent])
        values = merge(values, read_yaml(path))
    return complete(values, home=ROOT)


def model_config(model: Settings, train: TrainSettings, vocab_size: int) -> GPTConfig:
    """The model of the sections `model` and `train`."""
    return GPTConfig(**dict(model), vocab_size=vocab_size, sequence_tokens=train.sequence_tokens)


def slot_settings(evaluation: EvaluationSettings) -> SlotSettings:
    """SLOT's as an evaluation lists it; where it does not, without logits of the whole window."""
    listed = (choice.settings for choice in evaluation.adapters if choice.name == "slot")
    return next(listed, SlotSettings(context_logits="scored"))


def ran(model: GPT) -> dict[str, str]:
    """Which kernels and which attention backend a model computes with, for its rows."""
    return {
        "kernels": model.kernels,
        "attention": model.attention_backend,
    }


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)
