"""The table of scored targets that every figure of slot_eval is a sum of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fairway.data.token_bytes import ByteCounts, token_bytes
from fairway.distributed import World, gather_on_main
from fairway.errors import UserError
from fairway.evaluation.bits_per_byte import bits_per_byte, original_metrics
from fairway.evaluation.text import ScoredBatch

if TYPE_CHECKING:  # an exported evaluation does without
    import pandas as pd

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
    """One rank's part of the table.

    columns: name → array [m]. fit_iterations: int64 [fits].
    """

    columns: dict[str, np.ndarray]
    fit_iterations: np.ndarray


def gain_column(label: str) -> str:
    """The column of the nats that an adapter took off each target's loss."""
    return f"gain_{label}"


def column_kinds(labels: Sequence[str]) -> dict[str, str]:
    """Name → dtype of what an evaluation with the adapters `labels` writes for each target."""
    return {**COLUMNS, **dict.fromkeys(map(gain_column, labels), "float64")}


def rank_scores(
    batches: Iterable[ScoredBatch],
    labels: Sequence[str],
    num_targets: int,
    advance: Callable[[int], object] = lambda windows: None,
) -> RankScores:
    """The columns of what a rank scores; `advance` is told how many windows each batch finished.

    num_targets: of all batches. Their rows fill columns on the device, so that no step waits for a
    copy, and no small tensors stay between the large ones of the steps, where they would keep the
    memory from being used again.
    """
    kinds = column_kinds(labels)
    columns: dict[str, Tensor] = {}
    fit_iterations: list[Tensor] = []
    filled = 0
    for scored in batches:
        losses = scored.nats
        steps = zip(labels, losses[:-1], losses[1:], strict=True)
        row = {
            "position": scored.positions,
            "token": scored.targets,
            "window": scored.windows,
            "lane": scored.lanes,
            "nll_before": losses[0],
            **{gain_column(label): before - after for label, before, after in steps},
            "nll_after": losses[-1],
            "in_own_loss": scored.in_own_loss,
        }
        begin, filled = filled, filled + len(scored.positions)
        for name, values in row.items():
            if name not in columns:
                columns[name] = values.new_empty(num_targets, dtype=getattr(torch, kinds[name]))
            columns[name][begin:filled] = values
        if len(scored.fit_iterations):
            fit_iterations.append(scored.fit_iterations)
        advance(scored.num_windows)
    assert filled == num_targets, "a target was missed"
    return RankScores(
        columns={
            name: columns[name].cpu().numpy() if columns else np.zeros(0, kind)
            for name, kind in kinds.items()
        },
        fit_iterations=torch.cat(fit_iterations).cpu().numpy() if fit_iterations else np.zeros(0),
    )


def gather_scores(world: World, own: RankScores) -> list[RankScores]:
    """All ranks' parts on the first rank; nothing on the others.

    Columns go one by one and are taken out of `own`, so that a large table is nowhere in memory
    twice.
    """
    iterations = gather_on_main(world, own.fit_iterations)
    parts = [RankScores({}, one) for one in iterations]
    for name in list(own.columns):
        columns = gather_on_main(world, own.columns.pop(name))
        for part, column in zip(parts, columns, strict=True):
            part.columns[name] = column
    return parts


def mean_fit_iterations(parts: Sequence[RankScores]) -> float:
    """Iterations of a fit, over all ranks; 0 where no adapter fits anything."""
    iterations = np.concatenate([part.fit_iterations for part in parts])
    return float(iterations.mean()) if len(iterations) else 0.0


def token_table(
    parts: Sequence[RankScores], tokens: np.ndarray, counts: ByteCounts, bos_id: int
) -> "pd.DataFrame":
    """`token_columns` as a table."""
    import pandas as pd

    return pd.DataFrame(token_columns(parts, tokens, counts, bos_id), copy=False)


def token_columns(
    parts: Sequence[RankScores], tokens: np.ndarray, counts: ByteCounts, bos_id: int
) -> dict[str, np.ndarray]:
    """All ranks' rows in the order of the text, with each target's document and bytes.

    tokens: integers [n + 1]. parts: their columns are taken out of them, one by one, so that no
    large table is in memory twice. Raises UserError where a loss is not finite.
    """
    names = list(parts[0].columns)
    rows = [part.columns["position"] - 1 for part in parts]
    columns = {name: _in_order(parts, rows, name, len(tokens) - 1) for name in names}
    assert np.array_equal(columns["position"], np.arange(1, len(tokens))), "a target was missed"
    _check_finite(columns)
    begun = np.cumsum(tokens == bos_id, dtype=np.int32)
    columns["document"] = begun[1:] - begun[0]
    columns["bytes"] = token_bytes(tokens, counts)
    names.insert(1, "document")
    names.insert(names.index("in_own_loss"), "bytes")
    return {name: columns[name] for name in names}


def _in_order(
    parts: Sequence[RankScores], rows: Sequence[np.ndarray], name: str, num_targets: int
) -> np.ndarray:
    """One column of all parts, each value at its target's row; 0 where there is none."""
    ordered = np.zeros(num_targets, parts[0].columns[name].dtype)
    for part, row in zip(parts, rows, strict=True):
        ordered[row] = part.columns.pop(name)
    return ordered


def _check_finite(columns: Mapping[str, np.ndarray]) -> None:
    for name, advice in (
        ("nll_before", "without any adapter: check the artifact"),
        ("nll_after", "after adaptation: learn less in evaluation.adapters, or leave one out"),
    ):
        finite = np.isfinite(columns[name])
        if not finite.all():
            position = columns["position"][finite.argmin()]
            raise UserError(f"the loss of validation token {position} is not finite {advice}")


def table_metrics(
    table: "pd.DataFrame | Mapping[str, np.ndarray]", original_bytes: int | None = None
) -> dict[str, float | int | None]:
    """Sums over the table: loss and bits per byte with the adapters and without, and the gains.

    val_loss, val_loss_before, gain_nats, gain_<adapter>_nats: nats per token.
    original_bytes: of the table's text before normalization, where that is known.
    """
    tokens, total_bytes = len(table["position"]), int(table["bytes"].sum())
    before, after = float(table["nll_before"].sum()), float(table["nll_after"].sum())
    gains = [name for name in table if name.startswith("gain_")]
    return {
        "val_loss": after / tokens,
        "val_bpb": bits_per_byte(after, total_bytes),
        "val_loss_before": before / tokens,
        "val_bpb_before": bits_per_byte(before, total_bytes),
        "gain_nats": (before - after) / tokens,
        **{f"{name}_nats": float(table[name].sum()) / tokens for name in gains},
        "tokens": tokens,
        "bytes": total_bytes,
        **original_metrics(after, original_bytes),
    }
