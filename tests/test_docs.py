"""The pages for people: links lead somewhere, commands and configs that they show are ones."""

import importlib
import re
import tomllib
from argparse import ArgumentParser
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml

from fairway.audit.runner import EVALUATOR_CHECKS
from fairway.cli import main
from fairway.recipe import SHARED, complete
from fairway.stage import stage_parser
from fairway.stages import STAGES, stages_per
from pages import PAGES, blocks, commands, prose
from tiny import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
TUTORIAL = ROOT / "docs/first_experiment.md"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


SITE = yaml.safe_load(read("mkdocs.yml"))
PROJECT = tomllib.loads(read("pyproject.toml"))["project"]


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
    if not target.is_file():
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
    assert fault(TUTORIAL, "examples")  # a folder is no page of the site
    assert fault(TUTORIAL, "log.md#range-coder") is None  # an id, not a heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_one_title(page):
    assert len(re.findall(r"^# ", prose(page), re.MULTILINE)) == 1


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs/index.md"
    names = [link.partition("#")[0] for link in LINK.findall(prose(index))]
    pages = {*(ROOT / "docs").rglob("*.md")} - {index}
    assert pages <= {(index.parent / name).resolve() for name in names}


# The site, as far as it can be checked without MkDocs


def pages_of(entries: list) -> list[str]:
    """The pages of a navigation, at any depth."""
    values = [value for entry in entries for value in entry.values()]
    return list(chain(*(pages_of(one) if isinstance(one, list) else [one] for one in values)))


def test_the_navigation_has_every_page_once():
    names = pages_of(SITE["nav"])
    outside = [name.removeprefix("repository/") for name in names if "repository/" in name]
    inside = [name for name in names if "repository/" not in name]
    docs = ROOT / "docs"
    assert sorted(inside) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
    assert all((ROOT / name).is_file() for name in outside)


def test_pages_need_no_network():
    assert not [page for page in PAGES if "mermaid" in dict(blocks(page))]  # its script is loaded
    assert SITE["theme"]["font"] is False


def test_every_name_of_the_api_reference_can_be_imported():
    listed = re.findall(r"^::: (\S+)\.(\w+)$", read("docs/reference/api.md"), re.MULTILINE)
    for module, name in listed:
        assert getattr(importlib.import_module(module), name).__doc__, name
    used = re.findall(r"^from (\S+) import (.+)$", read("docs/api.md"), re.MULTILINE)
    assert {name for _, names in used for name in names.split(", ")} <= {name for _, name in listed}


def test_the_picture_of_the_stages_shows_all_of_them():
    picture = read("docs/images/stages.svg")
    assert set(re.findall(r"<text x.*?>(\w+)<", picture)) == set(STAGES)


# Configs in the text


def shown_configs(page: Path) -> list[dict]:
    """The page's blocks that are whole configs of a user's own."""
    found = [text for _, text in blocks(page) if re.search(r"^\s*recipe: ", text, re.MULTILINE)]
    return [yaml.safe_load(text) for text in found]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if shown_configs(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_shown_configs_are_accepted(page):
    for values in shown_configs(page):
        complete({"seeds": [1], **values}, home=ROOT)


def test_the_tutorials_variant_shares_what_it_says():
    config = complete(shown_configs(TUTORIAL)[1], home=ROOT)
    folders = config.folders["strong_prior"]
    own = {one.name for one in stages_per("variant") if folders[one.name] != SHARED}
    assert own == {"slot_eval", "audit"}
    assert config.run == "quickstart"


# Commands in the text: that they can be given; test_guides.py gives those of the guides


@cache
def snakemake_parser() -> ArgumentParser:
    from snakemake.cli import get_argument_parser  # takes seconds

    return get_argument_parser()


def check_snakemake(words: list[str]) -> None:
    parsed = snakemake_parser().parse_args(words)
    assert {*parsed.targets, *parsed.forcerun} <= set(STAGES)
    for name in re.findall(r"recipe=(\w+)", " ".join(words)):
        assert (ROOT / f"config/{name}.yaml").is_file()
    if parsed.workflow_profile:
        assert (ROOT / "profiles" / parsed.workflow_profile).is_dir()


def check_fairway(words: list[str]) -> None:
    main(words)  # leaves by SystemExit where it cannot read them; else it finds no run here


def check_python(words: list[str]) -> None:
    script = words[0]
    if script.startswith("workflow/scripts/") and "--help" not in words:
        stage_parser(STAGES[Path(script).stem], None).parse_args(words[1:])
    assert script in {"-m", "evaluate.pyz"} or (ROOT / script).is_file()


def check_make(words: list[str]) -> None:
    makefile = read("Makefile")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words)


def check_pip(words: list[str]) -> None:
    extras = chain(*(one.split(",") for one in re.findall(r"\.\[([\w,]+)\]", " ".join(words))))
    assert words[0] == "install" and set(extras) <= set(PROJECT["optional-dependencies"])


PROGRAMS = {
    "snakemake": check_snakemake,
    "fairway": check_fairway,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
}


def shown_commands(page: Path) -> list[list[str]]:
    found = [commands(text) for kind, text in blocks(page) if kind in ("", "sh") and usable(text)]
    return [words for words in chain(*found) if words[0] in PROGRAMS]


def usable(text: str) -> bool:
    """Whether a block is of commands: its first word is a program's."""
    return text.split()[0:1] != [] and text.split()[0] in {*PROGRAMS, "source", "git", "torchrun"}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if shown_commands(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_shown_commands_can_be_given(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in shown_commands(page):
        PROGRAMS[words[0]](words[1:])


def test_a_command_that_cannot_be_given_would_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--no-such-option"], ["no_such_stage"]):
        with pytest.raises((SystemExit, AssertionError)):
            check_snakemake(words)
    with pytest.raises(SystemExit):
        check_fairway(["compare", "--no-such-option"])
    with pytest.raises(SystemExit):
        check_python(["workflow/scripts/gptq.py", "--train", "folder"])


# What is explained


def test_every_check_of_the_audit_is_explained():
    checks = {*EVALUATOR_CHECKS, "lineage", "budgets", "program"}
    for name, title in (("audit.md", "fails when"), ("troubleshooting.md", "FAIL means")):
        table = re.search(
            rf"^\| check \|.*{title}.*\n(?:\|.*\n)+", prose(ROOT / "docs" / name), re.M
        )
        assert set(re.findall(r"^\| `(\w+)` \|", table[0], re.MULTILINE)) == checks, name


def test_every_entry_of_the_log_has_a_result_a_consequence_and_a_line_in_the_index():
    index, *entries = re.split(r"^### ", prose(ROOT / "docs/log.md"), flags=re.MULTILINE)
    names = [re.search(r'<a id="([^"]+)">', entry)[1] for entry in entries]
    assert sorted(names) == sorted(re.findall(r"^\| \[.*\]\(#([^)]+)\) \|", index, re.MULTILINE))
    for entry in entries:
        parts = re.findall(r"^\*\*(Result|Consequence)\.\*\* .", entry, re.MULTILINE)
        assert parts == ["Result", "Consequence"], entry.splitlines()[0]


# What is installed


def test_every_dependency_is_in_the_notices():
    needed = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    names = {re.match(r"[\w\-]+", one).group() for one in needed}
    rows = re.findall(r"^\| ([\w\-]+) \|", prose(ROOT / "THIRD_PARTY_NOTICES.md"), re.MULTILINE)
    assert names == {*rows} - {"package"}


def test_the_citation_names_the_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    changes = read("CHANGELOG.md")
    assert f"## {citation['version']} — {citation['date-released']}" in changes
