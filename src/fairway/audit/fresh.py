"""An evaluator named `module:function` whose every call runs in a process of its own.

What an evaluator keeps in memory between calls cannot reach the next one then: it is examined as
it would score a text that it has never seen.

    python -m fairway.audit.fresh module:function tokens.npy answer.safetensors
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fairway.audit.interface import Scores, check_form
from fairway.errors import UserError, told

FAULT_STATUS = 3
"""The process ends with this where the evaluator raised or stopped, and says so in one line."""


def load_callable(name: str, option: str) -> Callable:
    """Import `module:function`; UserError, naming the command-line `option`, where that fails."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{option} is {name!r}: expected module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{option} {name!r}: {error}; run the command in the folder that holds the module, "
            "or install what it imports"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{option} {name!r}: {module_name} has no function {function_name!r}")
    return function


@dataclass(frozen=True)
class FreshEvaluator:
    """Calls `name`, found from `folder` or as an installed module, in a new interpreter each time.

    Raises UserError where it stops or raises there.
    """

    name: str
    folder: Path

    def __call__(self, tokens: Tensor) -> Scores | Tensor:
        with tempfile.TemporaryDirectory() as scratch:
            text, answer = Path(scratch, "tokens.npy"), Path(scratch, "answer.safetensors")
            np.save(text, tokens.cpu().numpy())
            arguments = ["-m", "fairway.audit.fresh", self.name, text, answer]
            run_evaluator(self.name, arguments, self.folder, answer)
            return _read(answer)

    def here(self) -> Callable[[Tensor], Scores | Tensor]:
        """The evaluator in this process."""
        return load_callable(self.name, "--evaluator")


def run_evaluator(
    name: str, arguments: Sequence[str | Path], folder: Path, answer: Path | None = None
) -> bytes:
    """Run Python with `arguments` in `folder`. answer: the file that it writes.

    Returns what it prints, where there is no such file. Raises UserError, with the last line on
    stderr, where it fails or leaves no answer.
    """
    command = list(map(str, [sys.executable, *arguments]))
    stdout = subprocess.PIPE if answer is None else None
    done = subprocess.run(command, cwd=folder, stdout=stdout, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0 or not (answer is None or answer.is_file()):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"its process ended with status {done.returncode}"
        raise UserError(f"{name} could not be audited: {last}")
    return done.stdout


def _read(path: Path) -> Scores | Tensor:
    tensors = load_file(path)
    if "positions" not in tensors:
        return tensors["log_probs"]
    return Scores(**{field.name: tensors.get(field.name) for field in fields(Scores)})


def write_answer(returned: Scores | Tensor, path: Path) -> None:
    """Write what an evaluator returned; UserError where it has not the form that it should."""
    check_form(returned)
    if isinstance(returned, Tensor):
        values = {"log_probs": returned}
    else:
        named = {field.name: getattr(returned, field.name) for field in fields(Scores)}
        values = {name: value for name, value in named.items() if value is not None}
    save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, path)


def main(arguments: list[str]) -> int:
    """Run one call; the exit status."""
    name, text, answer = arguments
    sys.path.insert(0, str(Path.cwd()))
    try:
        evaluator = load_callable(name, "--evaluator")
        write_answer(evaluator(torch.from_numpy(np.load(text))), Path(answer))
    except UserError as error:
        fault = str(error)
    except SystemExit as stopped:
        fault = f"it ended the program with sys.exit({stopped.code!r}): remove that call"
    except Exception as error:  # whatever the audited code raises
        fault = f"it raised {told(error)}"
    else:
        return 0
    print(fault, file=sys.stderr)
    return FAULT_STATUS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
