"""Which of Fairway's own source files a script runs, and a fingerprint of what they mean."""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# They carry settings, messages and hashes, never numbers: a better error message retrains nothing.
PLUMBING = ("command", "config", "errors", "progress", "provenance", "sources")


def import_closure(script: str | Path) -> tuple[Path, ...]:
    """`script` and every file of the fairway package that it imports, directly or not, sorted."""
    found: set[Path] = set()
    waiting = [Path(script).resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(_imported_files(path))
    return tuple(sorted(found))


def fingerprint(script: str | Path) -> str:
    """SHA-256 over the syntax trees of `import_closure(script)`, docstrings and PLUMBING left out.

    Comments, layout and documentation do not change it, so editing them reruns nothing.
    """
    digest = hashlib.sha256()
    for path in import_closure(script):
        if path.parent == PACKAGE and path.stem in PLUMBING:
            continue
        digest.update(path.name.encode())
        digest.update(_meaning(path))
    return digest.hexdigest()


@cache
def _imported_files(path: Path) -> tuple[Path, ...]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    candidates = (_module_file(name) for name in names if name.split(".")[0] == PACKAGE.name)
    return tuple(sorted(candidate for candidate in candidates if candidate))


def _module_file(name: str) -> Path | None:
    base = PACKAGE.joinpath(*name.split(".")[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _meaning(path: Path) -> bytes:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()
