"""The table of scored targets that every figure of slot_eval is a sum of."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairway.errors import UserError
from fairway.evaluation.bits_per_byte import ByteCounts, bits_per_byte, token_bytes
from fairway.evaluation.evaluator import EvaluatorSettings, score_stream, target_nll
from fairway.evaluation.stream import ModelLogits, lane_groups
from fairway.evaluation.windows import sliding_windows
from fairway.model.gpt import GPT

COLUMNS = {
    "position": "int64",
    "token": "int32",
    "window": "int32",
    "lane": "int16",
    "nll_before": "float64",
    "nll_after": "float64",
    "in_own_loss": "bool",
}


@dataclass(frozen=True)
class RankScores:
    """One rank's part. columns: name -> array [m]. iterations: int64 [fits] of L-BFGS."""

    columns: dict[str, np.ndarray]
    iterations: np.ndarray


def score_rank(
    model_logits: ModelLogits,
    tokens: Tensor,
    settings: EvaluatorSettings,
    bos_id: int,
    rank: int,
    world_size: int,
    advance: Callable[[int], object],
    *,
    kernels: str = "plain",
    model: GPT | None = None,
    seed: int = 0,
) -> RankScores:
    """Score this rank's share of tokens int64 [n + 1]; `advance` is told how many windows are done.

    Other arguments as in `score_stream`. Results stay on the device until the end, so that no step
    waits for a copy.
    """
    kinds = column_kinds(settings)
    parts: dict[str, list[Tensor]] = {name: [] for name in (*kinds, "iterations")}
    for scored in score_stream(
        model_logits, tokens, settings, bos_id, rank, world_size,
        kernels=kernels, model=model, seed=seed,
    ):  # fmt: skip
        losses = [target_nll(logits, scored.targets) for logits in scored.logits]
        steps = zip(settings.evaluation.adapters, losses[:-1], losses[1:], strict=True)
        gains = {gain_column(name): before - after for name, before, after in steps}
        row = {
            "position": scored.positions,
            "token": scored.targets,
            "window": scored.windows,
            "lane": scored.lanes,
            "nll_before": losses[0],
            **gains,
            "nll_after": losses[-1],
            "in_own_loss": scored.in_own_loss,
            "iterations": scored.iterations,
        }
        for name, values in row.items():
            parts[name].append(values)
        advance(scored.num_windows)
    joined = {
        name: torch.cat(values).cpu().numpy() if values else np.zeros(0)
        for name, values in parts.items()
    }
    iterations = joined.pop("iterations")
    columns = {name: joined[name].astype(kind) for name, kind in kinds.items()}
    return RankScores(columns, iterations)


def gain_column(adapter: str) -> str:
    """The column of the nats that an adapter took off each target's loss."""
    return f"gain_{adapter}"


def column_kinds(settings: EvaluatorSettings) -> dict[str, str]:
    """Name → dtype of what the evaluation itself writes for each target."""
    gains = [gain_column(name) for name in settings.evaluation.adapters]
    return {**COLUMNS, **dict.fromkeys(gains, "float64")}


def windows_of_rank(
    num_targets: int, settings: EvaluatorSettings, rank: int, world_size: int
) -> tuple[int, int]:
    """How many windows this rank scores, and how many there are."""
    cut = settings.evaluation
    windows = sliding_windows(num_targets, cut.window_tokens, cut.stride_tokens)
    groups = lane_groups(len(windows), cut, settings.shares_batches)[rank::world_size]
    return sum(len(run) for group in groups for _, run in group), len(windows)


def token_table(
    parts: Sequence[RankScores], tokens: np.ndarray, counts: ByteCounts, bos_id: int
) -> pd.DataFrame:
    """All ranks' rows in the order of the stream, with each target's document and bytes.

    tokens: integers [n + 1]. Raises UserError where a loss is not finite.
    """
    names = parts[0].columns
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
    order = np.argsort(columns["position"], kind="stable")
    table = pd.DataFrame({name: column[order] for name, column in columns.items()})
    assert np.array_equal(table["position"], np.arange(1, len(tokens))), "a target was missed"
    finite = np.isfinite(table["nll_before"]) & np.isfinite(table["nll_after"])
    if not finite.all():
        raise UserError(
            f"the loss of validation token {table['position'][finite.argmin()]} is not finite: "
            "check the artifact, raise slot.l2 or lower lora.learning_rate"
        )
    begun = np.cumsum(tokens == bos_id)
    table.insert(1, "document", (begun - begun[0])[1:].astype(np.int32))
    place = table.columns.get_loc("in_own_loss")
    table.insert(place, "bytes", token_bytes(tokens, counts).astype(np.int16))
    return table


def table_metrics(table: pd.DataFrame) -> dict[str, float | int]:
    """Sums over the table: loss and bits per byte with the adapters and without, and the gains."""
    tokens, total_bytes = len(table), int(table["bytes"].sum())
    before, after = float(table["nll_before"].sum()), float(table["nll_after"].sum())
    gains = [name for name in table.columns if name.startswith("gain_")]
    return {
        "val_loss": after / tokens,
        "val_bpb": bits_per_byte(after, total_bytes),
        "val_loss_before": before / tokens,
        "val_bpb_before": bits_per_byte(before, total_bytes),
        "gain_nats": (before - after) / tokens,
        **{f"{name}_nats": float(table[name].sum()) / tokens for name in gains},
        "tokens": tokens,
        "bytes": total_bytes,
    }


class TimedLogits:
    """A model's logits, with the time that they took added up without waiting for the GPU."""

    def __init__(self, model_logits: ModelLogits, device: torch.device):
        self._model_logits = model_logits
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple] = []

    def __call__(self, tokens: Tensor, first_place: int) -> Tensor:
        begin = self._mark()
        logits = self._model_logits(tokens, first_place)
        self._marks.append((begin, self._mark()))
        return logits

    def _mark(self):
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Time of all calls so far; waits for the GPU."""
        if not self._is_cuda:
            return sum(end - begin for begin, end in self._marks)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
