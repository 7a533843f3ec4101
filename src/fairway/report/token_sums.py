"""tokens.parquet of the slot stage, summed: by document, by position, by membership in the loss.

A published validation stream has 60 million rows, so the table is read in batches and only sums
are kept. Every total of the report about one stream comes from here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet

from fairway.errors import UserError

COLUMNS = ("position", "document", "nll_before", "nll_after", "bytes", "in_own_loss")
# Tokens since the document's BOS: the first 16 together, then doubling.
DOCUMENT_POSITION_EDGES = np.array([0, *(16 << power for power in range(20))])
STREAM_PARTS = 20
BATCH_ROWS = 1 << 20


@dataclass(frozen=True)
class TokenSums:
    """Sums over one seed's and variant's scored targets; `nats_*` are summed losses.

    by_document: index document; by_document_position: index first position of the bin;
    by_stream_part: index part 0 … STREAM_PARTS − 1 of equal length; by_own_loss: index bool.
    Columns of each: tokens, bytes, nats_before, nats_after. Groups without a target are absent.
    """

    by_document: pd.DataFrame
    by_document_position: pd.DataFrame
    by_stream_part: pd.DataFrame
    by_own_loss: pd.DataFrame

    def total(self) -> pd.Series:
        """tokens, bytes, nats_before and nats_after of the whole stream."""
        return self.by_own_loss.sum()


def gain_nats(sums: pd.DataFrame) -> pd.Series:
    """Nats per token that the adaptation saved in each group; positive is better."""
    return (sums["nats_before"] - sums["nats_after"]) / sums["tokens"]


def read_token_sums(path: Path) -> TokenSums:
    """Sum a tokens.parquet, whose rows are sorted by position; UserError if it is another table."""
    file = parquet.ParquetFile(path)
    missing = sorted(set(COLUMNS) - set(file.schema_arrow.names))
    if missing or file.metadata.num_rows == 0:
        found = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise UserError(f"{path} {found}: rerun the slot_eval stage")
    partial: dict[str, list[pd.DataFrame]] = {}
    document, begin = -1, 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(COLUMNS)):
        table = batch.to_pandas()
        begins = _document_begins(table, document, begin)
        document, begin = int(table["document"].iloc[-1]), int(begins[-1])
        for name, key in _group_keys(table, begins, file.metadata.num_rows).items():
            partial.setdefault(name, []).append(_sum_by(table, key))
    return TokenSums(**{name: _combine(parts) for name, parts in partial.items()})


def _document_begins(table: pd.DataFrame, document: int, begin: int) -> np.ndarray:
    """int64 [rows]: the stream position of each row's document's BOS.

    document, begin: those of the row before the batch, −1 and 0 at the start of the stream, whose
    own BOS at position 0 is no target.
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
        "by_stream_part": (position - 1) * STREAM_PARTS // rows,
        "by_own_loss": table["in_own_loss"].to_numpy(),
    }


def _sum_by(table: pd.DataFrame, key: np.ndarray) -> pd.DataFrame:
    rows = pd.DataFrame(
        {
            "tokens": np.ones(len(table), dtype=np.int64),
            "bytes": table["bytes"].to_numpy(dtype=np.int64),
            "nats_before": table["nll_before"].to_numpy(dtype=np.float64),
            "nats_after": table["nll_after"].to_numpy(dtype=np.float64),
        }
    )
    return rows.groupby(key).sum()


def _combine(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts).groupby(level=0).sum()
