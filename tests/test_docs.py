"""The pages for people: links lead somewhere, and configs that they show are ones."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

from fairway.recipe import SHARED, complete
from fairway.stages import stages_per
from tiny import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}.*\n|^\n)+", re.MULTILINE)
TUTORIAL = ROOT / "docs/first_experiment.md"


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Where a link into the page may lead: ids, and headings as GitHub names them."""
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    slugs = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def fault(page: Path, link: str) -> str | None:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return f"{link}: there is no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"{link}: there is no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(prose(page)) if "://" not in link]
    assert not [told for link in links if (told := fault(page, link))]


def test_a_broken_link_would_be_found():
    assert fault(TUTORIAL, "no_such_page.md") and fault(TUTORIAL, "stages.md#no-such-heading")
    assert fault(TUTORIAL, "log.md#range-coder") is None  # an id, not a heading


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs/index.md"
    names = [link.partition("#")[0] for link in LINK.findall(prose(index))]
    pages = {*(ROOT / "docs").rglob("*.md")} - {index}
    assert pages <= {(index.parent / name).resolve() for name in names}


# Configs in the text


def shown_configs(page: Path) -> list[dict]:
    """The page's blocks that are whole configs of a user's own."""
    text = page.read_text(encoding="utf-8")
    blocks = [block for kind, block in FENCED.findall(text) if kind == "yaml"]
    blocks += INDENTED.findall(prose(page))
    found = [block for block in blocks if re.search(r"^\s*recipe: ", block, re.MULTILINE)]
    return [yaml.safe_load(block) for block in found]


@pytest.mark.parametrize("name", ["README.md", "config/README.md", "docs/first_experiment.md"])
def test_shown_configs_are_accepted(name):
    configs = shown_configs(ROOT / name)
    assert configs
    for values in configs:
        complete({"seeds": [1], **values}, home=ROOT)


def test_the_tutorials_variant_shares_what_it_says():
    config = complete(shown_configs(TUTORIAL)[1], home=ROOT)
    folders = config.folders["strong_prior"]
    own = {one.name for one in stages_per("variant") if folders[one.name] != SHARED}
    assert own == {"slot_eval", "audit"}
    assert config.run == "quickstart"


# What is installed


def test_every_dependency_is_in_the_notices():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {re.match(r"[\w\-]+", one).group() for one in needed}
    rows = re.findall(r"^\| ([\w\-]+) \|", prose(ROOT / "THIRD_PARTY_NOTICES.md"), re.MULTILINE)
    assert names == {*rows} - {"package"}


def test_the_citation_names_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {citation['version']} — {citation['date-released']}" in changes
