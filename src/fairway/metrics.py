"""The schema of metrics.json: what every stage says of its run, and what each adds.

`docs/reference/metrics.md` is generated from these classes. Losses are in nats per token, val_bpb
in bits per byte; a key that a stage cannot know is null.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from fairway.errors import UserError
from fairway.records import read_record
from fairway.settings import Fault


class Metrics(BaseModel):
    """Of every stage; a stage without a class of its own may add any keys."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, use_attribute_docstrings=True)

    stage: str
    """Name of the stage."""
    seed: int | None
    """Seed of everything random; null for a stage that runs once a run."""
    folder: str | None
    """Folder of the stage under `seed-<s>`: `shared` or a variant."""
    seconds: float
    """Wall-clock seconds of the stage, from start to the last product."""
    training_seconds: float = 0.0
    """Of them, seconds that count towards budgets.training_seconds."""
    evaluation_seconds: float = 0.0
    """Of them, seconds of evaluation; slot_eval's count towards budgets.evaluation_seconds."""
    phase_seconds: dict[str, float]
    """Seconds of the first process: `start`, of the job until the stage's own work begins; `wait`,
    for a GPU; `read`; `compile`, by Triton or torch.compile, loading flash-attn unless that was
    part of `start`, capturing CUDA graphs, and train's warm-up; `write`, without metrics.json and
    provenance.json; and `work`."""
    device: str
    """Name of the GPU, or the processor's name, architecture and number of threads."""
    processes: int
    """Processes that worked together."""
    peak_memory_bytes: int
    """Of the GPU's allocator on CUDA, else of the process."""


class _Model(Metrics):
    """Of stages that run the model."""

    model_config = ConfigDict(extra="forbid")

    kernels: str
    """`plain` or `fused`: the formulation that ran."""
    kernels_reason: str | None = None
    """Why `runtime.kernels: auto` did not take the fused one, where a GPU could run it."""
    attention_backend: str
    """What computed attention."""
    precision: str
    """Dtype of activations and matrix products."""
    cuda_graphs: bool | None = None
    """Whether kernels were replayed as CUDA graphs; null where the stage never does."""


class _Score(_Model):
    """Of stages that leave weights with a score."""

    val_loss: float
    """Mean loss of the validation split's targets."""
    val_bpb: float
    """Σ nats / (ln 2 · Σ bytes) over them."""
    tokens: int
    """Targets scored."""
    bytes: int
    """Bytes of text that they stand for, as they decode."""
    val_bpb_original: float | None = None
    """Σ nats / (ln 2 · original_bytes)."""
    original_bytes: int | None = None
    """Bytes of the validation split's text before the tokenizer normalized it; null where only its
    tokens are known, as of finished shards."""


class TokenizeMetrics(Metrics):
    """Of tokenize."""

    model_config = ConfigDict(extra="forbid")

    tokens: int
    """In all splits."""
    bytes: int
    """Of decoded text, in all splits."""
    documents: int
    """In all splits."""
    original_bytes: int | None = None
    """Of the text before normalization, in all splits; null of finished shards."""
    overlap_documents: int | None = None
    """Validation documents that occur in the training text; null where nobody looked."""
    bytes_per_token: float
    """bytes / tokens."""
    splits: dict[str, dict[str, int]]
    """Split → its tokens, bytes and documents."""


class TrainMetrics(_Score):
    """Of train; the score is that of the last weights."""

    identity: str
    """Hash of settings, seed, data and code: a checkpoint of another identity is never resumed."""
    steps: int
    """Optimizer steps done."""
    train_tokens: int
    """Tokens that they read."""
    train_loss: float
    """Of the last step."""
    tokens_per_second: float
    """Over the training clock."""
    parameters: int
    """Of the model."""


class EmaMetrics(_Score):
    """Of ema."""

    average: str
    """The tracker whose weights were taken: `ema_<decay>`, `swa`, or `last`."""
    selection_losses: dict[str, float]
    """Tracker → loss on held-out training text; empty where nothing had to be chosen."""


class TttMetrics(_Score):
    """Of ttt."""

    data: str
    """What it trained on: `train`, `val` or `none`."""
    epoch_losses: list[float]
    """Mean training loss of each epoch."""


class GptqMetrics(_Score):
    """Of gptq; the score is that of the weights read back from the artifact."""

    quantizer: str
    """Name of the quantizer."""
    calibration: str | None
    """Where calibration text came from; null where the quantizer needs no Hessians."""
    artifact_bytes: int
    """Length of artifact.bin."""
    code_bytes: int
    """Length of the program that evaluates it, packed into one file with every built-in adapter and
    room for its settings."""
    total_bytes: int
    """Both together, which the limit is about."""
    limit_bytes: int
    """budgets.artifact_bytes."""
    streams: dict[str, int]
    """Kind of number → bytes of its stream in the artifact."""
    codecs: dict[str, str]
    """Kind of number → what packed it."""
    zeros: int
    """Codes zeroed to fit the limit."""
    step_factor: float = 1.0
    """The factor on all steps with which the artifact fills the limit, where it was looked for."""
    mean_error: float
    """Mean over matrices of the quantizer's own measure; of GPTQ tr((W−Q)·H·(W−Q)ᵀ)."""
    mean_error_round_to_nearest: float | None = None
    """The same for rounding to nearest, where the quantizer compares itself with that."""


class SlotEvalMetrics(_Score):
    """Of slot_eval: sums over tokens.parquet; each gain_<adapter>_nats is a part of gain_nats."""

    model_config = ConfigDict(extra="allow")

    val_loss_before: float
    """Of the plain sliding window, with the model as global updates have made it."""
    val_bpb_before: float
    """Of the plain sliding window, likewise."""
    gain_nats: float
    """val_loss_before − val_loss."""
    adapters: list[dict[str, str]]
    """`name` (as in the column gain_<name>), `title` and `kernels` of each, in order."""
    order: Literal["text"] = "text"
    """The declared order of the targets, which global updates and all adapters keep: each
    distribution is a function of the tokens before it. The audit flips tokens against it."""
    global_updates: int = 0
    """How often the model was trained on scored text."""
    shares_batches: bool
    """Whether windows share what they are scored with, as in the reference submission's code."""
    windows: int
    """Windows scored."""
    mean_iterations: float
    """L-BFGS iterations of a fit, where an adapter fits."""
    sliding_seconds: float
    """Seconds of the model's own forward passes."""
    adapter_seconds: float
    """Seconds of everything else in the scoring."""

    @model_validator(mode="after")
    def _only_gains_are_extra(self) -> Self:
        unknown = [
            name for name in self.model_extra or {} if not re.fullmatch("gain_.+_nats", name)
        ]
        if unknown:
            raise Fault(f"unknown keys {', '.join(unknown)}")
        return self


class AuditMetrics(_Model):
    """Of audit."""

    verdict: str
    """PASS, FAIL or NOT RUN."""
    check_seconds: dict[str, float]
    """Part of the audit → its seconds."""


class ExportMetrics(Metrics):
    """Of export."""

    model_config = ConfigDict(extra="forbid")

    code_bytes: int
    """Length of evaluate.pyz."""
    total_bytes: int
    """With artifact.bin, which the limit is about."""


class ReportMetrics(Metrics):
    """Of report: what the page is about, by which a later one is told from it."""

    model_config = ConfigDict(extra="forbid")

    seeds: list[int]
    """Seeds of the run."""
    scores: dict[str, float]
    """Variant → mean val_bpb over the seeds."""
    verdicts: dict[str, str]
    """Variant → its audits' gravest verdict."""
    settings_sha256: str
    """SHA-256 of all settings of all stages."""


METRICS: dict[str, type[Metrics]] = {
    "tokenize": TokenizeMetrics,
    "train": TrainMetrics,
    "ema": EmaMetrics,
    "ttt": TttMetrics,
    "gptq": GptqMetrics,
    "slot_eval": SlotEvalMetrics,
    "audit": AuditMetrics,
    "report": ReportMetrics,
    "export": ExportMetrics,
}


def checked_metrics(values: dict[str, Any]) -> dict[str, Any]:
    """A stage's metrics as the JSON values that metrics.json holds, held against its class."""
    kind = METRICS.get(values["stage"], Metrics)
    return kind.model_validate(values).model_dump(mode="json")


def read_metrics(path: str | Path, stage: str, made_by: str) -> dict[str, Any]:
    """The metrics.json of a stage, held against its class. made_by: what makes it.

    Raises UserError where the file is missing, damaged, or of another stage.
    """
    record = read_record(METRICS.get(stage, Metrics), path, made_by)
    if record.stage != stage:
        raise UserError(
            f"{path} is of the stage {record.stage!r:.80}: expected the file made by {made_by}"
        )
    return record.model_dump(mode="json")
