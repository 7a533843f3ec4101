"""What MkDocs does besides, for mkdocs.yml: files outside docs that pages link become pages.

Links are written for the repository, so that they lead somewhere on GitHub and in an editor. On
the site a file outside docs is a page under `repository`: Markdown as it is, else a listing.
"""

import os.path
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = "repository"
LINK = re.compile(r"(?P<fenced>^```.*?^```)|(?<=\]\()(?P<path>[^()\s#:]+)(?=[#)])", re.M | re.S)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".patch": "diff"}


def on_config(config: MkDocsConfig) -> None:
    """Headings get the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = anchor


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each file that a page links, and for those that such a page links."""
    pages = [DOCS / page.src_uri for page in files.documentation_pages()]
    for page in pages:
        for target in linked(page):
            if files.get_file_from_path(site_name(target)) is None:
                files.append(File.generated(config, site_name(target), content=shown(target)))
                pages += [target] if target.suffix == ".md" else []


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    name = page.file.src_uri
    inside = name.removeprefix(f"{OUTSIDE}/")
    source = DOCS / name if inside == name else ROOT / inside
    if not source.is_file():  # a listing
        return markdown

    def turned(match: re.Match[str]) -> str:
        if match["fenced"]:
            return match[0]
        target = site_name((source.parent / match["path"]).resolve())
        return os.path.relpath(target, os.path.dirname(name))

    return LINK.sub(turned, markdown)


def linked(page: Path) -> Iterator[Path]:
    """The files that a Markdown file links."""
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / match["path"]).resolve() if match["path"] else page
        if target.is_file():
            yield target


def site_name(path: Path) -> str:
    """Where a file of the repository is on the site, before it is made HTML."""
    is_page = path.suffix == ".md"
    if path.is_relative_to(DOCS) and (is_page or path.suffix in {".png", ".svg"}):
        return path.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}{'' if is_page else '.md'}"


def shown(path: Path) -> str:
    """The Markdown of a file's page; a listing is found by no search."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    title = path.relative_to(ROOT).as_posix()
    language = LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {title}\n\n~~~~~~{language}\n{text}\n~~~~~~\n"


def anchor(heading: str, separator: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)
