"""The one table of stages: what each may read of the config, takes, makes, and is charged to.

Rules, scripts, audit and report read it; a new stage is a row here, a rule file and a script:

    tokenize → train → ema → ttt → gptq → slot_eval → report
                                        ↘ audit ↗ → export
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from fairway.settings import Settings

SHARED = "shared"
"""The folder of a stage as the recipe has it, for all variants that change nothing in it."""

RECORDS = ("metrics.json", "provenance.json")
"""What every stage leaves besides its products; provenance.json is written last."""


class Budgets(Settings):
    """The challenge's limits (section `budgets`)."""

    artifact_bytes: int = Field(16_000_000, ge=1)
    """Code and weights, decimal bytes."""
    training_seconds: float = Field(600.0, gt=0)
    """All stages that read training text, on the machine that runs them."""
    evaluation_seconds: float = Field(600.0, gt=0)
    """Scoring the validation text."""


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    """Of its script, its rule's target, its folder and its `stage` in metrics.json."""
    title: str
    """For people."""
    sections: tuple[str, ...]
    """Sections of the config that it may read, or `section.key`; others do not rerun it."""
    needs: tuple[str, ...]
    """Stages whose products it takes."""
    products: tuple[str, ...]
    """Files in its folder, besides RECORDS."""
    per: Literal["dataset", "variant", "run"] = "variant"
    """How often it runs: once a dataset, once a seed and variant, or once a run."""
    charged: Literal["training", "evaluation"] | None = None
    """The budget that its seconds of that name count towards."""
    scores: bool = False
    """Whether its metrics have the val_bpb of the weights that it made."""
    names_only: tuple[str, ...] = ()
    """Packages of built-in classes that its settings name but that it does not run."""
    memory: tuple[str, ...] = ()
    """Keys to lower where it runs out of memory."""
    on_request: bool = False
    """Whether it runs only where its target is named, and not with everything."""

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU where there is one: it reads which device it gets."""
        return "runtime" in self.sections

    @property
    def script(self) -> str:
        """File name under workflow/scripts; `tokenize.py` would hide the standard library's."""
        return "tokenize_text.py" if self.name == "tokenize" else f"{self.name}.py"

    @property
    def files(self) -> tuple[str, ...]:
        """All that it leaves in its folder."""
        return (*self.products, *RECORDS)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "tokenize",
            "Tokens and splits",
            sections=("data",),
            needs=(),
            products=("tokenizer.model", "manifest.json"),
            memory=("data.shard_tokens", "data.max_train_docs"),
            per="dataset",
        ),
        Stage(
            "train",
            "Training, last step",
            sections=("model", "train", "gptq.quantizer", "runtime"),
            needs=("tokenize",),
            products=("weights.safetensors", "averages.safetensors", "metrics.parquet"),
            memory=("train.micro_batch_sequences", "model.width"),
            charged="training",
            scores=True,
            # Late QAT rounds as the quantizer does; of the built-in one that is `integers.py`.
            names_only=("fairway.quantization.quantizers",),
        ),
        Stage(
            "ema",
            "Weight averaging (EMA)",
            sections=("ema", "runtime"),
            needs=("tokenize", "train"),
            products=("weights.safetensors",),
            memory=("train.ema_decays", "model.width"),
            charged="training",
            scores=True,
        ),
        Stage(
            "ttt",
            "Test-time training (TTT)",
            sections=("ttt", "runtime"),
            needs=("tokenize", "ema"),
            products=("weights.safetensors",),
            memory=("ttt.batch_sequences", "model.width"),
            charged="training",
            scores=True,
        ),
        Stage(
            "gptq",
            "Quantized artifact (GPTQ)",
            sections=("gptq", "budgets.artifact_bytes", "runtime"),
            needs=("tokenize", "ttt"),
            products=("artifact.bin", "layers.parquet"),
            memory=("gptq.batch_sequences", "gptq.calibration_tokens"),
            charged="training",
            scores=True,
        ),
        Stage(
            "slot_eval",
            "Sliding evaluation with adapters",
            sections=("evaluation", "runtime"),
            needs=("tokenize", "gptq"),
            products=("tokens.parquet",),
            memory=("evaluation.forward_windows", "evaluation.window_tokens"),
            charged="evaluation",
            scores=True,
        ),
        Stage(
            "audit",
            "Audit",
            sections=("audit", "evaluation", "budgets", "runtime"),
            needs=("tokenize", "train", "ema", "ttt", "gptq", "slot_eval"),
            products=("audit.json", "reach.parquet"),
            memory=("evaluation.forward_windows", "audit.stream_tokens", "audit.null_tokens"),
        ),
        Stage(
            "report",
            "Report",
            sections=("report",),
            needs=("tokenize", "train", "ema", "ttt", "gptq", "slot_eval", "audit"),
            products=(
                "report.html",
                "summary.md",
                "config.yaml",
                "stages.parquet",
                "summary.parquet",
                "comparisons.parquet",
                "gains.parquet",
                "budgets.parquet",
            ),
            per="run",
        ),
        Stage(
            "export",
            "Folder to hand over",
            sections=("export", "evaluation", "runtime"),
            needs=("tokenize", "gptq", "slot_eval", "audit"),
            products=(
                "evaluate.pyz",
                "artifact.bin",
                "tokenizer.model",
                "submission.json",
                "requirements.txt",
                "README.md",
                "log.txt",
            ),
            on_request=True,
        ),
    )
}


def chain(name: str) -> list[Stage]:
    """A stage and all that it builds on, in the order of the table."""
    wanted: set[str] = set()
    waiting = [name]
    while waiting:
        stage = waiting.pop()
        if stage not in wanted:
            wanted.add(stage)
            waiting.extend(STAGES[stage].needs)
    return [stage for stage in STAGES.values() if stage.name in wanted]


def stages_of_a_run() -> list[Stage]:
    """All but those that run on request only, in the order of the table."""
    return [stage for stage in STAGES.values() if not stage.on_request]


def stages_per(per: str, *, on_request: bool = False) -> list[Stage]:
    """The stages that run once a `dataset`, `variant` or `run`, in the order of the table.

    on_request: with those that run on request only.
    """
    stages = STAGES.values() if on_request else stages_of_a_run()
    return [stage for stage in stages if stage.per == per]


def made_by(stage: str, *, again: bool = False) -> str:
    """What makes a stage's files, for messages. again: where they are there, but another's."""
    # Snakemake does not look into a dataset's folder.
    option = "--forcerun " if again or STAGES[stage].per == "dataset" else ""
    return f"the {stage} stage; run `snakemake --cores 2 {option}{stage}`"


def charged_seconds(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`training_seconds` and `evaluation_seconds` of the stages that are charged to each budget.

    metrics: metrics.json of each stage.
    """
    return {
        f"{budget}_seconds": sum(
            one[f"{budget}_seconds"]
            for name, one in metrics.items()
            if STAGES[name].charged == budget
        )
        for budget in ("training", "evaluation")
    }
