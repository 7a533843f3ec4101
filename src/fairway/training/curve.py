"""The loss curve of a training: metrics.parquet at its end, metrics.jsonl while it runs.

metrics.jsonl lies among the checkpoints of its run. Its first line has the settings of the train
stage, each further one a row of metrics.parquet; a row without a value lacks its key.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import BaseModel, TypeAdapter

from fairway.files import atomic_path, read_table, reading, require_file

TABLE, LIVE = "metrics.parquet", "metrics.jsonl"


class Row(BaseModel):
    """A row of the curve, with the columns of metrics.parquet."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Of the step's batch, nats per token."""
    lr_scale: float
    """Factor of all learning rates."""
    seconds: float
    """The training clock."""
    tokens: int
    """Tokens read so far."""
    held_out_bpb: float | None = None
    """Bits per byte of held-out training text, where it was measured."""


COLUMNS = {
    name: "int64" if field.annotation is int else "float64"
    for name, field in Row.model_fields.items()
}
"""Of metrics.parquet, with their dtypes."""


class Curve(NamedTuple):
    """A training so far. settings: the sections of the train stage, as plain values."""

    settings: dict[str, Any]
    rows: list[Row]


class CurveFile:
    """metrics.jsonl of one training, for the process that writes it."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings
        self._file: TextIO | None = None

    @contextmanager
    def appending(self, rows: Iterable[Mapping[str, float]]) -> Iterator[None]:
        """Begin the file anew with the rows that there are; within, `append` adds others.

        They go to the file that was begun, whatever lies at the path by then: a process that was
        taken over while it was frozen adds nothing to the other one's.
        """
        with ExitStack() as stack:
            with atomic_path(self.path) as temporary:
                # Buffered by the line, so that a reader sees each at once.
                file = temporary.open("a", encoding="utf-8", buffering=1)
                self._file = stack.enter_context(file)
                for values in (self.settings, *rows):
                    self.append(values)
            yield

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line, within `appending`."""
        assert self._file is not None
        self._file.write(json.dumps(values, allow_nan=False) + "\n")


def read_curve_file(path: Path, made_by: str) -> Curve:
    """What metrics.jsonl holds; a last line that is cut is left out.

    made_by: what makes it, for the UserError where it is missing or damaged.
    """
    with reading(require_file(path, made_by), "JSON lines", made_by, ValueError):
        first, *rows = path.read_bytes().split(b"\n")[:-1] or [b"{}"]
        settings = TypeAdapter(dict[str, Any]).validate_json(first)
        return Curve(settings, [Row.model_validate_json(row) for row in rows])


def read_curve_table(path: Path, made_by: str) -> list[Row]:
    """The rows of metrics.parquet; UserError where it is missing or damaged."""
    table = read_table(path, made_by, COLUMNS)
    with reading(path, "a curve", made_by, ValueError):
        return [
            Row(**{name: value for name, value in row.items() if value == value})
            for row in table.to_dict("records")
        ]
