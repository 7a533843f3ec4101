"""The `fairway` command: audits any evaluator from the command line.

    fairway audit --evaluator my_script:evaluate --tokens val_000000.bin --vocab-size 1024

Exit status: 0 where no check fails (those not run are listed), 1 where one does, 2 for bad usage.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from fairway.audit.checks import check_budgets
from fairway.audit.flip_plan import Geometry, choose_excerpt
from fairway.audit.interface import FAIL, load_callable
from fairway.audit.lineage import check_lineage
from fairway.audit.null import draw_stream
from fairway.audit.runner import (
    AuditSettings,
    Subject,
    audit_evaluator,
    audit_record,
    verdict_lines,
)
from fairway.data.shards import read_shard
from fairway.errors import UserError
from fairway.files import write_json


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, return the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        record = audit(parsed)
    except UserError as error:
        print(f"fairway: {error}", file=sys.stderr)
        return 2
    print("\n".join(verdict_lines(record)))
    return 1 if record["verdict"] == FAIL else 0


def audit(parsed: argparse.Namespace) -> dict:
    """Audit the evaluator that the command line names; return the content of audit.json."""
    sys.path.insert(0, str(Path.cwd()))
    evaluator = load_callable(parsed.evaluator, "--evaluator")
    next_token = load_callable(parsed.next_token, "--next-token") if parsed.next_token else None
    base = load_callable(parsed.base, "--base") if parsed.base else None
    settings = AuditSettings(
        parsed.flips,
        parsed.stream_tokens,
        parsed.null_tokens,
        parsed.noise_repeats,
        parsed.significance,
    )
    tokens = _read_excerpt(parsed)
    draw = partial(draw_stream, next_token, tokens[:1]) if next_token else None
    subject = Subject(
        evaluator=evaluator,
        tokens=tokens,
        vocab_size=parsed.vocab_size,
        bos_id=parsed.bos_id,
        geometry=_geometry(parsed),
        draw=draw,
        base=base,
    )
    findings = audit_evaluator(subject, settings, parsed.seed)
    checks = [
        *findings.checks,
        check_lineage(parsed.provenance),
        check_budgets({}, {}),
    ]
    parameters = asdict(settings) | {"evaluator": parsed.evaluator, "tokens": str(parsed.tokens)}
    record = audit_record(checks, findings, variant=None, seed=parsed.seed, parameters=parameters)
    if parsed.output is not None:
        write_json(parsed.output, record)
    return record


def _read_excerpt(parsed: argparse.Namespace) -> torch.Tensor:
    """The audited tokens, int64 [n + 1], from the shard that `--tokens` names."""
    tokens = torch.from_numpy(read_shard(parsed.tokens).astype("int64"))
    if len(tokens) < 3:
        raise UserError(f"{parsed.tokens} holds {len(tokens)} tokens: expected at least 3")
    largest = int(tokens.max())
    if largest >= parsed.vocab_size:
        raise UserError(
            f"{parsed.tokens} holds token {largest}, --vocab-size is {parsed.vocab_size}: "
            "give the vocabulary size of the tokenizer that made the shard"
        )
    start = choose_excerpt(tokens, parsed.stream_tokens, parsed.bos_id)
    return tokens[start : start + parsed.stream_tokens + 1]


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
    add("--flips", type=int, default=64, help="tokens replaced, one evaluation each")
    add("--stream-tokens", type=int, default=4096, help="targets of the audited excerpt")
    add("--null-tokens", type=int, default=1024, help="tokens drawn for the null test")
    add("--noise-repeats", type=int, default=1, help="repeats that measure the backend's noise")
    add("--significance", type=float, default=0.001, help="false-alarm chance of the null test")
    add("--seed", type=int, default=0, help="of the flips and the drawn text")
    add("--output", type=Path, metavar="JSON", help="write the full record there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
