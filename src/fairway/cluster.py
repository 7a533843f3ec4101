"""What jobs ask a cluster for, from their work: megabytes and minutes (section `cluster`).

They are limits that a job should stay under by far, for a cluster kills what goes over. Each is a
few products of the config's and the dataset's numbers with the constants below, which are several
times what was measured.
"""

import math
from collections.abc import Mapping

from pydantic import Field

from fairway.data.manifest_fields import Manifest
from fairway.data.settings import DataSettings
from fairway.model.spec import GPTConfig, parameters
from fairway.settings import Settings

CPU_PROCESS_MB = 4_000
"""Of host memory, one process that computes on the CPU. Measured: up to 2,300."""
GPU_PROCESS_MB = 8_000
"""Of host memory, one process with a GPU: CUDA's libraries, compiled kernels, buffers. Measured: up
to 2,600."""
PARAMETER_BYTES = 64
"""Weights, the optimizer's state and the averages, in memory and on their way to a file."""
SCORED_TOKEN_BYTES = {"slot_eval": 1_000, "audit": 250, "report": 250}
"""Of the validation text's tokens: the n-gram index and the table of losses; the table. Measured:
580, 100 and 130."""
TEXT_BYTES = 30
"""Of memory for a byte of text that a tokenizer is trained on. Measured: 27."""

START_MINUTES = 20
"""Snakemake in the job, imports, compilation, checks of the input, plain evaluations."""
GPU_RATE = 1e13
"""Positions times parameters that one GPU passes forward in a second. Measured on an H200: 2.5e13
in slot_eval with adapters, 1.2e14 in train."""
CPU_RATE = 1e9
"""The same of a CPU core. Measured: 3e9 and 9e9."""
OTHER_PASSES = 8
"""Of the audit over its excerpt, besides one for each flip."""
TEXT_MB_PER_MINUTE = 6
"""Of text that a tokenizer is trained on and encodes. Measured on one core: 15."""
FETCH_MINUTES = 220
"""To get a dataset over the network, or to read one of finished shards through."""
DOWNLOADED_TEXT_MB = 2_000
"""The size of a text that is not there yet."""
EXPANSION = 5
"""Bytes of text to a byte of a compressed file."""


class ClusterSettings(Settings):
    """What jobs ask a cluster for (section `cluster`).

    No stage reads it, so a change of it reruns nothing. Each further attempt at a job asks for as
    much again.
    """

    memory_factor: float = Field(1.0, gt=0)
    """Times the memory of every job, as Fairway reckons it."""
    runtime_factor: float = Field(1.0, gt=0)
    """Times the minutes of every job."""


def megabytes(
    stage: str, sections: Mapping[str, Settings], manifest: Manifest | None, gpus: int
) -> float:
    """Host memory of a job of a stage. manifest: of the dataset, None for tokenize, which makes it.

    Raises FileNotFoundError where a file that tokenize reads is missing.
    """
    processes = gpus * GPU_PROCESS_MB or CPU_PROCESS_MB
    if manifest is None:
        return processes + _text_megabytes(sections["data"]) * TEXT_BYTES
    model = _parameters(sections, manifest) * PARAMETER_BYTES
    table = manifest.splits.val.tokens * SCORED_TOKEN_BYTES.get(stage, 0)
    return processes + (model + table) / 1e6


def minutes(
    stage: str, sections: Mapping[str, Settings], manifest: Manifest | None, gpus: int
) -> float:
    """Time of a job of a stage; arguments and errors as of `megabytes`."""
    if manifest is None:
        corpus = sections["data"].corpus()
        fetch = FETCH_MINUTES if corpus.downloads or corpus.brings_shards else 0
        return START_MINUTES + fetch + _text_megabytes(sections["data"]) / TEXT_MB_PER_MINUTE
    rate = gpus * GPU_RATE or CPU_RATE
    seconds = _positions(stage, sections, manifest) * _parameters(sections, manifest) / rate
    if stage == "train":
        seconds = min(seconds, sections["train"].max_seconds or math.inf)
    return START_MINUTES + seconds / 60


def _parameters(sections: Mapping[str, Settings], manifest: Manifest) -> int:
    config = GPTConfig(**dict(sections["model"]), vocab_size=manifest.vocab_size)
    return sum(math.prod(one.shape) for one in parameters(config).values())


def _positions(stage: str, sections: Mapping[str, Settings], manifest: Manifest) -> float:
    """Token positions that pass through the model; one that is trained on counts three times."""
    train, ttt = sections["train"], sections["ttt"]
    evaluation, audit = sections["evaluation"], sections["audit"]
    val = manifest.splits.val.tokens
    per_target = evaluation.window_tokens / evaluation.stride_tokens
    match stage:
        case "train":
            return 3 * train.max_steps * train.batch_tokens
        case "ttt" if ttt.data != "none":
            text = val if ttt.data == "val" else manifest.splits.adaptation.tokens
            return 3 * ttt.epochs * text
        case "slot_eval":
            return val * per_target
        case "audit":
            return (audit.flips + OTHER_PASSES) * audit.stream_tokens * per_target
    return 0  # the start has room for the others


def _text_megabytes(data: DataSettings) -> float:
    """Of the text that becomes tokens; finished shards have none."""
    corpus = data.corpus()
    if corpus.brings_shards:
        return 0
    if corpus.downloads:
        return DOWNLOADED_TEXT_MB
    plain = (".jsonl", ".txt", "")
    sizes = (
        path.stat().st_size * (1 if path.suffix in plain else EXPANSION) for path in data.files()
    )
    return sum(sizes) / 1e6
