"""tokens.parquet, summed: by document, by position, by membership in the loss.

The challenge's validation text has 60 million tokens, so the table is read in batches and only sums
are kept. Every total of the report about one scored text comes from here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fairway.errors import UserError
from fairway.files import BATCH_ROWS, open_table, read_batches
from fairway.stages import made_by

MADE_BY = made_by("slot_eval", again=True)
COLUMNS = {
    "position": "int64",
    "document": "int64",
    "nll_before": "float64",
    "nll_after": "float64",
    "bytes": "int64",
    "in_own_loss": "bool",
}
GAIN_PREFIX = "gain_"
"""`gain_<adapter>` holds the nats that the adapter took off each target's loss."""
DOCUMENT_POSITION_EDGES = np.array([0, *(64 << power for power in range(20))])
"""Bins of the tokens since the document's BOS: the first 64 together, then doubling."""
TEXT_PARTS = 20
"""The text is cut into so many parts of equal length."""


@dataclass(frozen=True)
class TokenSums:
    """Sums over one seed's and variant's scored targets; `nats_*` are summed losses.

    Columns of each: tokens, bytes, nats_before, nats_after, and gain_<adapter> for each adapter, in
    the table's order. Groups without a target are absent.
    """

    by_document: pd.DataFrame
    """Index: the document's number."""
    by_document_position: pd.DataFrame
    """Index: the first position of the bin, one of DOCUMENT_POSITION_EDGES."""
    by_text_part: pd.DataFrame
    """Index: the part of the text, 0 … TEXT_PARTS − 1."""
    by_own_loss: pd.DataFrame
    """Index: whether the target was in the loss of the delta that scored it."""

    def total(self) -> pd.Series:
        """tokens, bytes, nats_before, nats_after and gain_<adapter> of the whole text."""
        return self.by_own_loss.sum()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in the order they act."""
        return adapters_of(self.by_own_loss.columns)


def adapters_of(columns: Iterable[str]) -> tuple[str, ...]:
    """The adapters that have a column of gains, in the columns' order."""
    return tuple(name.removeprefix(GAIN_PREFIX) for name in columns if name.startswith(GAIN_PREFIX))


def saved_nats(
    sums: pd.DataFrame | pd.Series, adapter: str | None = None
) -> pd.Series | np.float64:
    """Nats that one adapter, or all together, took off the summed loss; positive is better."""
    if adapter is None:
        return sums["nats_before"] - sums["nats_after"]
    return sums[GAIN_PREFIX + adapter]


def gain_nats(sums: pd.DataFrame, adapter: str | None = None) -> pd.Series:
    """The same per token, in each group."""
    return saved_nats(sums, adapter) / sums["tokens"]


def read_token_sums(path: Path, batch_rows: int = BATCH_ROWS) -> TokenSums:
    """Sum a tokens.parquet, whose rows are the targets in order.

    Raises UserError where it is missing or damaged, another table, or empty.
    """
    file = open_table(path, MADE_BY, COLUMNS)
    rows = file.metadata.num_rows
    gains = [GAIN_PREFIX + name for name in adapters_of(file.schema_arrow.names)]
    if rows == 0:
        raise UserError(f"{path} is empty: expected the table made by {MADE_BY}")
    partial: dict[str, list[pd.DataFrame]] = {}
    read, document, begin = 0, -1, 0
    columns = COLUMNS | dict.fromkeys(gains, "float64")
    for table in read_batches(path, MADE_BY, columns, batch_rows):
        _require_order(path, table, read, document)
        begins = _document_begins(table, document, begin)
        read += len(table)
        document, begin = int(table["document"].iloc[-1]), int(begins[-1])
        for name, key in _group_keys(table, begins, rows).items():
            partial.setdefault(name, []).append(_sum_by(table, key, gains))
    return TokenSums(
        **{name: pd.concat(parts).groupby(level=0).sum() for name, parts in partial.items()}
    )


def _require_order(path: Path, table: pd.DataFrame, read: int, document: int) -> None:
    """Raise UserError unless rows that follow `read` others are the next targets of the text."""
    expected = np.arange(read + 1, read + len(table) + 1)
    documents = np.diff(table["document"].to_numpy(), prepend=max(document, 0))
    if not np.array_equal(table["position"], expected) or (documents < 0).any():
        raise UserError(
            f"{path} does not have the targets in the order of the text: expected the table made "
            f"by {MADE_BY}"
        )


def _document_begins(table: pd.DataFrame, document: int, begin: int) -> np.ndarray:
    """int64 [rows]: the position of the BOS of each row's document.

    document, begin: those of the row before the batch; −1 and 0 at the start of the text, whose own
    BOS at position 0 is no target.
    """
    position, documents = table["position"].to_numpy(), table["document"].to_numpy()
    is_begin = np.diff(documents, prepend=document) != 0
    if document < 0:
        is_begin[0] = False
    return np.maximum.accumulate(np.where(is_begin, position, begin))


def _group_keys(table: pd.DataFrame, begins: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    position = table["position"].to_numpy()
    bins = np.searchsorted(DOCUMENT_POSITION_EDGES, position - begins, side="right") - 1
    return {
        "by_document": table["document"].to_numpy(),
        "by_document_position": DOCUMENT_POSITION_EDGES[bins],
        "by_text_part": (position - 1) * TEXT_PARTS // rows,
        "by_own_loss": table["in_own_loss"].to_numpy(),
    }


def _sum_by(table: pd.DataFrame, key: np.ndarray, gains: list[str]) -> pd.DataFrame:
    names = {"bytes": "bytes", "nll_before": "nats_before", "nll_after": "nats_after"}
    rows = table[[*names, *gains]].rename(columns=names)
    rows.insert(0, "tokens", 1)
    return rows.groupby(key).sum()
