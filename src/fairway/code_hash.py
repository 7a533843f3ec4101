"""Which source files a script runs, and a hash of what they mean."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

PLUMBING = (
    "claims",
    "code_hash",
    "errors",
    "metrics",
    "plain",
    "plugins",
    "progress",
    "provenance",
    "recipe",
    "records",
    "settings",
    "stage",
    "stages",
    "yaml_text",
)
"""Modules that carry settings, messages and hashes, never numbers: editing them reruns nothing."""


def import_closure(*files: str | Path) -> tuple[Path, ...]:
    """The files and all that they import, directly or not, sorted.

    Followed are modules of the fairway package and, from a user's own module, those beside it.
    """
    found: set[Path] = set()
    waiting = [Path(file).resolve() for file in files]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = _imported(path.read_bytes())
            waiting.extend(file for name in names if (file := _module_file(name, path)))
    return tuple(sorted(found))


def code_hash(*files: str | Path) -> str:
    """SHA-256 over the syntax trees of `import_closure(*files)`, without docstrings and PLUMBING.

    Comments, layout and documentation do not change it, nor do the places of the files, so editing
    or moving them reruns nothing.
    """
    digest = hashlib.sha256()
    for name, tree in sorted(
        (path.name, _meaning(path.read_bytes()))
        for path in import_closure(*files)
        if path.parent != PACKAGE or path.stem not in PLUMBING
    ):
        digest.update(name.encode())
        digest.update(tree)
    return digest.hexdigest()


@cache
def _module_file(name: str, importer: Path) -> Path | None:
    package, *parts = name.split(".")
    if package == PACKAGE.name:
        base = PACKAGE.joinpath(*parts)
    elif PACKAGE not in importer.parents:
        base = importer.parent.joinpath(package, *parts)
    else:
        return None
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _imported(source: bytes) -> frozenset[str]:
    """The modules, and names in modules, that a file imports."""
    names: set[str] = set()
    for node in _statements(without_documentation(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@cache
def _meaning(source: bytes) -> bytes:
    return ast.dump(without_documentation(source)).encode()


@cache
def without_documentation(source: bytes) -> ast.Module:
    """The syntax tree of a file, without docstrings and descriptions of fields and constants.

    All callers get the same one: leave it as it is.
    """
    tree = ast.parse(source)
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            if isinstance(node, ast.ClassDef | ast.Module):
                node.body = [one for one in node.body if not _is_description(one)]
            node.body = node.body or [ast.Pass()]
    return tree


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The tree and what holds statements in it, and these; expressions are most of it."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for blocks in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting.extend(getattr(node, blocks, ()))


def _is_description(node: ast.stmt) -> bool:
    """A string under a field or a constant documents it."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
