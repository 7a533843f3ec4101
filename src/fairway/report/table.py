"""A table as plain data, shown alike on a page, a terminal and in Markdown."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LINE = 100
"""Characters of a line of text on a terminal; tables may be wider."""


class Cell(NamedTuple):
    """What stands in one field of a table, beside its text."""

    text: str = ""
    verdict: str = ""
    """An audit's, shown as a badge."""
    struck: bool = False
    """Whether the number is no valid score."""
    warning: str = ""
    """Told after it, in words."""
    detail: str = ""
    """Told under it, small."""
    link: str = ""
    """Where it leads, relative to the report's folder."""
    links: Sequence[tuple[str, str]] = ()
    """More of them after it: words and where they lead."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.text, self.verdict, self.warning, self.detail)))


Row = Sequence[Cell | str]


class Group(NamedTuple):
    """Rows under a heading of their own, or under none."""

    rows: Sequence[Row]
    heading: Cell | None = None


class Table(NamedTuple):
    """A head that begins with # is that of a column of numbers."""

    title: str
    caption: str
    heads: Sequence[str]
    groups: Sequence[Group]

    @property
    def rows(self) -> list[list[str]]:
        """Every row as text."""
        return [list(map(str, row)) for group in self.groups for row in group.rows]


def cells(row: Iterable[Cell | str]) -> list[Cell]:
    """A row whose entries are all cells."""
    return [Cell(one) if isinstance(one, str) else one for one in row]


def as_text(table: Table) -> str:
    """For a terminal: numbers to the right, everything else to the left."""
    heads = [head.removeprefix("#") for head in table.heads]
    lines = [heads, *table.rows] if table.rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.rjust(width) if head.startswith("#") else cell.ljust(width)
            for cell, width, head in zip(line, widths, table.heads, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(filter(None, (f"\n{table.title}", textwrap.fill(table.caption, LINE), *shown)))


def as_markdown(table: Table) -> str:
    """As GitHub shows it; a number that is no valid score is struck out, and said to be none."""
    marks = ["---:" if head.startswith("#") else "---" for head in table.heads]
    lines = [[head.removeprefix("#") for head in table.heads], marks]
    for group in table.groups:
        if group.heading:
            heading = group.heading._replace(text=f"**{group.heading.text}**")
            lines.append([_markdown(heading), *[""] * (len(marks) - 1)])
        lines += [[_markdown(cell) for cell in cells(row)] for row in group.rows]
    return "\n".join([f"{table.caption}\n", *(f"| {' | '.join(line)} |" for line in lines)])


def _markdown(cell: Cell) -> str:
    text, detail = (
        f"~~{one}~~" if cell.struck and one else one for one in (cell.text, cell.detail)
    )
    parts = (text, cell.verdict and f"**{cell.verdict}**", cell.warning, detail and f"({detail})")
    return " ".join(filter(None, parts)).replace("|", r"\|").replace("\u00a0", " ")
