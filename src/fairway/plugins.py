"""Classes found by name: Fairway's own, or a user's own as `module:Name`.

A plain name such as `lora` is a module of a package of Fairway, and the class in it is that name in
CamelCase: `fairway.evaluation.adapters.lora:Lora`. `my_cache:Cache` is the class `Cache` of
`my_cache.py`, which lies beside the config or wherever Python finds it. Neither needs an entry in a
list.
"""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from fairway.errors import UserError, told
from fairway.plain import shown

HINT = "; run in the folder that holds the module, or put it beside the config"
"""Where a module of the user's own was not found."""


def load(name: str, package: str) -> Any:
    """The class that `name` stands for; `package` holds those that need no module.

    Raises UserError where there is no such module or class, or where importing it fails.
    """
    module, class_name = _location(name, package)
    if ":" not in name and name not in (known := built_in_names(package)):
        raise UserError(
            f"found {shown(name)}, expected one of {', '.join(known)}, or module:Name of your own"
            f"{did_you_mean(name, known)}"
        )
    try:
        found = getattr(importlib.import_module(module), class_name, None)
    except ModuleNotFoundError as error:
        hint = HINT if ":" in name else f"; install it with `pip install {error.name}`"
        reason = f"No module named {shown(error.name)}{hint}"
        raise UserError(f"{shown(name)} could not be imported: {reason}") from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise UserError(f"{shown(name)} could not be imported: {told(error)}") from error
    if found is None:
        raise UserError(f"{shown(name)}: {module} has no class {class_name}")
    return found


@cache
def built_in_names(package: str) -> list[str]:
    """The plain names that `load` knows in `package`, sorted: its modules without `base`."""
    specification = importlib.util.find_spec(package)
    assert specification is not None and specification.submodule_search_locations
    modules = pkgutil.iter_modules(specification.submodule_search_locations)
    return sorted(module.name for module in modules if not module.ispkg and module.name != "base")


def source_file(name: str, package: str) -> Path:
    """The file that defines the class, without importing it; UserError where there is none."""
    module, _ = _location(name, package)
    try:
        specification = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        specification = None
    if specification is None or specification.origin is None:
        raise UserError(f"{shown(name)}: no module {module}{HINT}")
    return Path(specification.origin)


def search_beside(paths: Iterable[str | Path]) -> None:
    """Let `load` find modules that lie in these folders, such as those of the config's files."""
    for path in map(str, paths):
        if path not in sys.path:
            sys.path.append(path)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?` for the nearest of the known names, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _location(name: str, package: str) -> tuple[str, str]:
    module, separator, class_name = name.partition(":")
    if not separator:
        return f"{package}.{name}", "".join(part.capitalize() for part in name.split("_"))
    if not all(part.isidentifier() for part in (*module.split("."), class_name)):
        raise UserError(f"found {shown(name)}, expected a name or module:Name")
    return module, class_name
