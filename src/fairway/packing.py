"""The program that scores an artifact as one file: `evaluate.pyz`, which runs without Fairway."""

import ast
import io
import json
import lzma
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairway.code_hash import PACKAGE, import_closure, without_documentation
from fairway.errors import UserError, in_short
from fairway.plugins import built_in_names, source_file

SOURCE = PACKAGE / "evaluation/standalone.py"
PROGRAM = "evaluate.pyz"
"""Its name in an exported folder."""
PLAN = "settings.json"
"""The settings in it."""
ADAPTERS = "fairway.evaluation.adapters"
NEEDED = ("torch", "numpy", "sentencepiece", "pydantic")
"""What the program imports that is not Python's own."""
RANGE_CODER = "constriction"
"""What it needs besides, for an artifact that has a range-coded stream."""
PLAN_BYTES = 2048
"""Set aside for the settings that the program carries, which are known after the artifact only."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Of every file in the program, so that equal code is equal bytes; ZIP knows no earlier time."""

MAIN = f"""import importlib.util, json, lzma, pathlib, sys, tempfile

plan = json.loads(__loader__.get_data("{PLAN}"))
missing = [name for name in plan["packages"] if importlib.util.find_spec(name) is None]
if missing:
    names = " ".join(missing)
    sys.exit(f"error: evaluate.pyz needs {{names}}: pip install {{names}}")
with tempfile.NamedTemporaryFile(suffix=".zip") as code:
    code.write(lzma.decompress(__loader__.get_data("code.zip.xz")))
    code.flush()
    sys.path.insert(0, code.name)
    from fairway.evaluation.standalone import main

    main(plan, pathlib.Path(sys.argv[0]).resolve().parent)
"""


def packages(codecs: Iterable[str]) -> list[str]:
    """What a program imports that is not Python's own. codecs: those of the artifact's streams."""
    return [*NEEDED, *([RANGE_CODER] if "range" in codecs else [])]


def evaluation_program(
    settings: Mapping[str, Any], seed: int, metrics: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """The bytes of `evaluate.pyz` for an evaluation: the same for the same code and settings.

    settings: plain sections, `evaluation` and `runtime` among them. metrics: those of gptq, and of
    slot_eval, whose device says the number of threads: the last bits of sums on a CPU depend on it.
    """
    threads = re.search(r"(\d+) threads", metrics["slot_eval"]["device"])
    plan = {name: settings[name] for name in ("evaluation", "runtime")}
    plan |= {"seed": seed, "threads": int(threads[1]) if threads else None}
    plan["packages"] = packages(metrics["gptq"]["codecs"].values())
    return _packed([next(iter(one)) for one in plan["evaluation"]["adapters"]], plan)


def code_bytes() -> int:
    """The length of the program with every built-in adapter, and room for its settings, in bytes.

    Only with adapters of the user's own may a program be longer.
    """
    return len(_packed(built_in_names(ADAPTERS), {})) + PLAN_BYTES


def _packed(adapters: Sequence[str], plan: Mapping[str, Any]) -> bytes:
    """The program with these adapters. plan: as `standalone.main` takes it.

    Modules come without comments and docstrings. They are packed together, which takes less than
    half of what it takes to pack each by itself, as zipapp does.
    """
    modules = {
        name: ast.unparse(without_documentation(source)).encode()
        for name, source in _modules(adapters).items()
    }
    files = {
        "__main__.py": MAIN.encode(),
        "code.zip.xz": lzma.compress(_zipped(modules, zipfile.ZIP_STORED), preset=9),
        PLAN: json.dumps(plan, sort_keys=True).encode(),
    }
    return _zipped(files, zipfile.ZIP_DEFLATED)


def _modules(adapters: Sequence[str]) -> dict[str, bytes]:
    """Path in the program → source of each module, and of the packages that they lie in."""
    files = [source_file(name, ADAPTERS) for name in adapters]
    roots = [PACKAGE.parent]
    for name, file in zip(adapters, files, strict=True):
        if ":" in name:
            roots.append(file.parents[name.count(".") + (file.name == "__init__.py")])
    found = {}
    for path in import_closure(SOURCE, *files):
        root = next(root for root in roots if path.is_relative_to(root))
        name = path.relative_to(root)
        found[name.as_posix()] = path.read_bytes()
        for package in name.parents[:-1]:
            found.setdefault(f"{package.as_posix()}/__init__.py", b"")
    return found


def _zipped(files: Mapping[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), files[name], method, compresslevel=9)
    return buffer.getvalue()


def read_plan(program: Path) -> dict[str, Any]:
    """The settings that an `evaluate.pyz` carries; UserError where it is no such program."""
    try:
        with zipfile.ZipFile(program) as archive:
            return dict(json.loads(archive.read(PLAN)))
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{program} is no program of the export stage ({in_short(error)}): name --evaluator"
        ) from error
