"""What the pages for people show: links, headings, blocks of code, commands."""

import re
import shlex
from pathlib import Path

from tiny import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block of code, in order; an indented one has no language."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(kind, fenced or indented) for kind, fenced, indented in found]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block, whose lines a backslash joins."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shown_file(text: str) -> tuple[str, str] | None:
    """Name and content of a block whose first line names a file: `# mine.yaml`."""
    match = re.match(r"# ([\w.]+)$", text.partition("\n")[0])
    return (match[1], text) if match else None
