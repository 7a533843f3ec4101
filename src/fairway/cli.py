"""The `fairway` command: audits any evaluator, resumes a run, checks results.

    fairway audit --evaluator my_script:evaluate --tokens val_000000.bin --vocab-size 1024
    fairway resume
    fairway check results/quickstart

Exit status: 0 where no check fails (those not run are listed), 1 where one does, 2 for bad usage
and where the evaluator itself stops or raises, so that nothing was audited. `resume` becomes
Snakemake, whose status it has.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from fairway import check, resume
from fairway.audit.flip_plan import Geometry
from fairway.audit.interface import FAIL
from fairway.audit.result import AuditResult
from fairway.audit.runner import AuditSettings, audit
from fairway.data.shards import read_shard
from fairway.errors import UserError, told
from fairway.files import write_json
from fairway.settings import validated


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, return the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except UserError as error:
        print(f"fairway: {error}", file=sys.stderr)
        return 2


def run_audit(parsed: argparse.Namespace) -> int:
    """`fairway audit`; whatever the audited code does is told as a UserError."""
    try:
        result = audit_named(parsed)
    except UserError:
        raise
    except SystemExit as stopped:
        raise UserError(
            f"{parsed.evaluator} ended the program with sys.exit({stopped.code!r}), so nothing was "
            "audited: remove that call"
        ) from stopped
    except Exception as error:
        raise UserError(
            f"{parsed.evaluator} could not be audited: it raised {told(error)}"
        ) from error
    print(result)
    return 1 if result.verdict == FAIL else 0


def audit_named(parsed: argparse.Namespace) -> AuditResult:
    """Audit the evaluator that the command line names, and write audit.json where asked to."""
    if parsed.output is not None and parsed.output.is_dir():
        raise UserError(f"--output {parsed.output} is a folder: name a file")
    sys.path.insert(0, str(Path.cwd()))
    values = {name: getattr(parsed, name) for name in AuditSettings.model_fields}
    result = audit(
        load_callable(parsed.evaluator, "--evaluator"),
        read_shard(parsed.tokens),
        vocab_size=parsed.vocab_size,
        bos_id=parsed.bos_id,
        next_token=_optional_callable(parsed.next_token, "--next-token"),
        base=_optional_callable(parsed.base, "--base"),
        geometry=_geometry(parsed),
        provenance=parsed.provenance,
        settings=validated(AuditSettings, values, "audit"),
        seed=parsed.seed,
    ).with_checks(evaluator=parsed.evaluator, tokens=str(parsed.tokens))
    if parsed.output is not None:
        write_json(parsed.output, result.content())
    return result


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


def _optional_callable(name: str | None, option: str) -> Callable | None:
    return None if name is None else load_callable(name, option)


def _geometry(parsed: argparse.Namespace) -> Geometry | None:
    if parsed.window_tokens is None and parsed.stride_tokens is None:
        return None
    if parsed.window_tokens is None or parsed.stride_tokens is None:
        raise UserError("--window-tokens and --stride-tokens aim the flips together: give both")
    return Geometry(parsed.window_tokens, parsed.stride_tokens, parsed.lanes, parsed.batch_windows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairway", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    audit_parser = commands.add_parser(
        "audit",
        help="check that an evaluator's scores are causal",
        description="Check that an evaluator's scores are causal; docs/audit.md has the details.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    audit_parser.set_defaults(run=run_audit)
    add = audit_parser.add_argument
    function = "MODULE:FUNCTION"
    add(
        "--evaluator",
        required=True,
        metavar=function,
        help="tokens [n+1] → log-probabilities [n, V]",
    )
    add("--tokens", required=True, type=Path, metavar="SHARD", help="shard of validation tokens")
    add("--vocab-size", required=True, type=int, help="tokens in the vocabulary")
    add("--bos-id", type=int, default=1, help="token that starts each document")
    add("--next-token", metavar=function, help="plain model: prefix → log-probabilities [V]")
    add("--base", metavar=function, help="the evaluator without adaptation, to name the track")
    add("--provenance", type=Path, help="provenance.json of the artifact")
    geometry = audit_parser.add_argument_group("geometry of the evaluation (aims the flips)")
    geometry.add_argument("--window-tokens", type=int, help="context length of a window")
    geometry.add_argument("--stride-tokens", type=int, help="targets scored by each later window")
    geometry.add_argument("--lanes", type=int, default=1, help="runs of windows side by side")
    geometry.add_argument("--batch-windows", type=int, default=1, help="windows adapted together")
    for name, field in AuditSettings.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=field.annotation, default=field.default, help=field.description)
    add("--seed", type=int, default=0, help="of the flips and the drawn text")
    add("--output", type=Path, metavar="JSON", help="write audit.json there")
    others = (
        ("resume", "go on with the last run, after it was killed", resume),
        ("check", "tell which files of a run are missing, unfinished or changed", check),
    )
    for name, help_text, module in others:
        command_parser = commands.add_parser(name, help=help_text, description=module.__doc__)
        module.add_options(command_parser)
        command_parser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
