"""Rows of the benchmark's table: what was measured, against which bar, and what agrees."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Bar:
    """What is asked of one H200 at the reference submission's size."""

    text: str
    reached: bool


@dataclass(frozen=True)
class Agreement:
    """Largest difference found between the two ways of a stage, and what is allowed."""

    what: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False for NaN as well."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Row:
    """One measure of one stage.

    ratio: how many times better than the baseline, above 1 where the fast path wins. ceiling_share:
    of the ceiling named in `ceiling`. Peak bytes are what each side took by itself; None on a CPU.
    """

    stage: str
    measure: str
    fast: float
    baseline: float | None = None
    ratio: float | None = None
    ceiling: str | None = None
    ceiling_share: float | None = None
    baseline_peak_bytes: int | None = None
    fast_peak_bytes: int | None = None
    kernels: str | None = None
    attention: str | None = None
    bars: tuple[Bar, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    note: str = ""


def ratio_of(rates: Mapping[str, float]) -> float | None:
    """How many times better the fast way's rate is; None without a baseline."""
    return rates["fast"] / rates["baseline"] if "baseline" in rates else None


COLUMNS = (
    "stage", "measure", "baseline", "fast", "ratio", "of ceiling", "GiB baseline", "GiB fast",
    "kernels", "attention", "bar",
)  # fmt: skip


def table(rows: Sequence[Row], bars_apply: bool) -> str:
    """All rows as aligned text, then every agreement and note."""
    cells = [COLUMNS, *(_cells(row, bars_apply) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_remarks(rows)])


def _cells(row: Row, bars_apply: bool) -> tuple[str, ...]:
    share = "" if row.ceiling_share is None else f"{row.ceiling_share:.1%} {row.ceiling}"
    return (
        row.stage,
        row.measure,
        number(row.baseline),
        number(row.fast),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        share,
        _gibibytes(row.baseline_peak_bytes),
        _gibibytes(row.fast_peak_bytes),
        row.kernels or "",
        row.attention or "",
        "; ".join(_bar(bar, bars_apply) for bar in row.bars),
    )


def _bar(bar: Bar, applies: bool) -> str:
    verdict = ("reached" if bar.reached else "MISSED") if applies else "not judged here"
    return f"{bar.text}: {verdict}"


def _remarks(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        for check in row.agreements:
            lines.append(
                f"{row.stage}: {check.what}: differs by {check.difference:.3g}, allowed "
                f"{check.tolerance:.3g}: {'ok' if check.holds else 'DISAGREES'}"
            )
        if row.note:
            lines.append(f"{row.stage}, {row.measure}: {row.note}")
    return lines


def number(value: float | None) -> str:
    """Four significant digits, thousands set apart."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _gibibytes(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def disagreements(rows: Iterable[Row]) -> list[str]:
    """Every agreement that does not hold, one line each."""
    return [
        f"{row.stage}: {check.what}" for row in rows for check in row.agreements if not check.holds
    ]


def write_results(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """All rows so far, with what they were measured on."""
    document = {**about, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
