"""The house: imports run only downwards, and nothing is imported late to hide that one does not."""

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from fairway.code_hash import PACKAGE
from fairway.recipe import SECTIONS, section_class
from fairway.settings import Settings
from fairway.stages import STAGES
from tiny import ROOT, SCRIPTS

LAYERS = (
    "cli",
    "watch",
    "trackers",
    "check",
    "resume",
    "cluster",
    "referee",
    "export",
    "report",
    "audit",
    "evaluation",
    "quantization",
    "training",
    "model",
    "data",
    "packing",
    "stage",
    "runs",
    "metrics",
    "provenance",
    "records",
    "recipe",
    "stages",
    "gpus",
    "settings",
    "plugins",
    "yaml_text",
    "plain",
    "code_hash",
    "distributed",
    "progress",
    "files",
    "claims",
    "phases",
    "allot",
    "errors",
)
"""From the top down. A module may import those of its own line and of lower ones."""

BLACK_BOX = {"evaluation", "quantization", "training", "model", "data"}
"""The audit knows an evaluator only as a function."""

LATE = {
    "fairway.model.runtime": "fairway.model.fused.forward_backward",
    "fairway.evaluation.adapters.slot": "fairway.evaluation.adapters.fit.logit_delta_kernel",
}
"""What may be imported inside a function: kernels in Triton, which not every machine has."""


class Arrow(NamedTuple):
    """One import. is_late: inside a function."""

    importer: str
    imported: str
    is_late: bool

    def __str__(self) -> str:
        return f"{self.importer} → {self.imported}" + (" (late)" if self.is_late else "")

    @property
    def layers(self) -> tuple[str, str]:
        importer, imported = self.importer.split(".")[1], self.imported.split(".")[1]
        return importer, imported


def modules() -> dict[str, Path]:
    """Every module of the package that holds code; packages themselves are empty."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            found[".".join(("fairway", *path.relative_to(PACKAGE).with_suffix("").parts))] = path
    return found


MODULES = modules()


@cache
def arrows() -> list[Arrow]:
    return [
        Arrow(name, imported, is_late)
        for name, path in MODULES.items()
        for imported, is_late in imports(ast.parse(path.read_text(encoding="utf-8")))
    ]


def imports(node: ast.AST, is_late: bool = False) -> Iterator[tuple[str, bool]]:
    """The modules of the package that a syntax tree imports."""
    for child in ast.iter_child_nodes(node):
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            names = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
        yield from ((name, is_late) for name in names if name in MODULES)
        within = is_late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, within)


def shown(found: list[Arrow]) -> str:
    return "\n".join(["", *map(str, found)])


def test_every_module_has_its_line():
    parts = {name.split(".")[1] for name in MODULES}
    assert parts == set(LAYERS)
    assert len(arrows()) > 100


def test_imports_run_only_downwards():
    line = {layer: number for number, layer in enumerate(LAYERS)}
    upward = [one for one in arrows() if line[one.layers[0]] > line[one.layers[1]]]
    assert not upward, shown(upward)


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for one in arrows():
        graph[one.importer].add(one.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' ← '.join(error.args[1])}")


def test_the_audit_knows_no_evaluator_of_ours():
    found = [one for one in arrows() if one.layers[0] == "audit" and one.layers[1] in BLACK_BOX]
    assert not found, shown(found)


def test_the_plain_model_knows_nothing_of_its_twin():
    """model/fused is known to model/runtime.py only."""
    found = [
        one
        for one in arrows()
        if one.imported.startswith("fairway.model.fused")
        and not one.importer.startswith("fairway.model.fused")
    ]
    assert {one.importer for one in found} == {"fairway.model.runtime"}, shown(found)


def test_only_kernels_are_imported_late():
    found = [one for one in arrows() if one.is_late]
    foreign = [one for one in found if LATE.get(one.importer) != one.imported]
    assert not foreign, shown(foreign)
    assert len(found) == len(LATE)


def test_packages_are_empty():
    """An __init__.py with imports would make every module of it depend on all."""
    full = [path for path in PACKAGE.rglob("__init__.py") if path.read_text()]
    # The referee's names are looked up when they are asked for.
    assert full == [PACKAGE / "__init__.py", PACKAGE / "audit/__init__.py"]
    assert "import fairway" not in (PACKAGE / "audit/__init__.py").read_text()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_sections_class_is_where_the_table_says(name):
    """recipe.py names them, for they lie above it."""
    module, _, class_name = SECTIONS[name].partition(":")
    assert module in MODULES
    assert issubclass(getattr(importlib.import_module(module), class_name), Settings)
    assert section_class(name).__name__ == class_name


def test_sections_of_stages_are_sections_with_such_keys():
    read = {section for stage in STAGES.values() for section in stage.sections}
    for one in read:
        section, _, key = one.partition(".")
        assert section in SECTIONS
        assert not key or key in section_class(section).model_fields
    # What a job gets of a machine changes no product.
    assert {one.partition(".")[0] for one in read} == set(SECTIONS) - {"gpus", "cluster"}


def test_every_stage_has_a_script_and_a_rule():
    assert {path.name for path in SCRIPTS.glob("*.py")} == {one.script for one in STAGES.values()}
    rules = {path.stem for path in (ROOT / "workflow/rules").glob("*.smk")}
    assert rules == {*STAGES, "common"}


def test_tests_share_only_helpers():
    """No test imports another one, and none reaches into the library's private names."""
    tests = list((ROOT / "tests").rglob("test_*.py"))
    assert len({path.name for path in tests}) == len(tests)
    names = {path.stem for path in tests}
    faults = []
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            imported = [alias.name for alias in getattr(node, "names", [])] if module else []
            if module in names or (isinstance(node, ast.Import) and node.names[0].name in names):
                faults.append(f"{path.name} imports a test")
            if str(module).startswith("fairway") and any(one.startswith("_") for one in imported):
                faults.append(f"{path.name} imports {module}.{imported}")
    assert not faults, "\n".join(faults)
