"""Is an evaluator's score causal, complete and within budget? `fairway audit`; docs/audit.md has
the details."""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from sentencepiece import SentencePieceProcessor

from fairway.audit.bookkeeping import Evaluation, read_evaluation
from fairway.audit.flip_plan import Geometry
from fairway.audit.fresh import FreshEvaluator, load_callable, run_evaluator
from fairway.audit.interface import FAIL, NOT_RUN, PASS, Check, Evaluator, Scores
from fairway.audit.result import AuditResult
from fairway.audit.runner import AuditSettings, audit
from fairway.audit.tally import SCORE_TOLERANCE_NATS
from fairway.data.shards import read_shard, write_shard
from fairway.data.token_bytes import byte_counts, token_bytes
from fairway.data.token_classes import token_classes
from fairway.data.tokenizer import load_tokenizer
from fairway.errors import UserError, told
from fairway.files import require_file, write_json
from fairway.packing import PROGRAM, read_plan
from fairway.records import read_record
from fairway.settings import validated
from fairway.stages import Budgets

COUNTED = (".bin", ".py", ".pyz", ".ptz", ".xz", ".zst", ".br")
"""Files of a submission's folder whose bytes count: weights and code."""


class Reported(BaseModel):
    """What is read of a submission.json."""

    model_config = ConfigDict(allow_inf_nan=False)

    val_loss: float | None = None
    val_bpb: float | None = None


def run(parsed: argparse.Namespace) -> int:
    """`fairway audit`; whatever the audited code does is told as a UserError."""
    _fill_in(parsed)
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
    tokens = read_shard(parsed.tokens)
    tokenizer = None if parsed.tokenizer is None else load_tokenizer(parsed.tokenizer)
    _check_vocabulary(parsed, tokenizer)
    byte_total = None if tokenizer is None else _text_bytes(tokens, tokenizer)
    submission = Submission.read(parsed)
    result = audit(
        _evaluator(parsed),
        tokens,
        vocab_size=parsed.vocab_size,
        bos_id=parsed.bos_id,
        next_token=_optional_callable(parsed.next_token, "--next-token"),
        base=_optional_callable(parsed.base, "--base"),
        geometry=_geometry(parsed),
        token_classes=None if tokenizer is None else token_classes(tokenizer),
        bytes_per_token=1.0 if byte_total is None else byte_total / (len(tokens) - 1),
        evaluation=submission.evaluation(tokens, byte_total),
        provenance=submission.provenance,
        used=submission.used,
        limits=submission.limits,
        settings=validated(AuditSettings, values, "audit"),
        seed=parsed.seed,
    ).with_checks(evaluator=parsed.evaluator, tokens=str(parsed.tokens), fresh=parsed.fresh)
    if _is_program(parsed.evaluator) and parsed.whole_text:
        program = Path(parsed.evaluator)
        result = result.with_checks(_check_program(program, parsed.tokens, submission.scores))
    if parsed.output is not None:
        write_json(parsed.output, result.content())
    return result


def _fill_in(parsed: argparse.Namespace) -> None:
    """Take from an exported folder what the command line does not name."""
    folder = parsed.submission
    program, model = (
        None if folder is None or not (folder / name).is_file() else folder / name
        for name in (PROGRAM, "tokenizer.model")
    )
    if parsed.evaluator is None and program is not None:
        parsed.evaluator, parsed.tokenizer = str(program), parsed.tokenizer or model
        if parsed.window_tokens is None and parsed.stride_tokens is None:
            cut = read_plan(program)["evaluation"]
            names = ("window_tokens", "stride_tokens", "lanes")
            parsed.window_tokens, parsed.stride_tokens, parsed.lanes = (cut[one] for one in names)
    if parsed.evaluator is None:
        raise UserError(f"name an --evaluator, or a --submission with an {PROGRAM} in it")
    if parsed.vocab_size is None:
        if parsed.tokenizer is None:
            raise UserError("give --vocab-size, or the --tokenizer that has it")
        parsed.vocab_size = load_tokenizer(parsed.tokenizer).vocab_size()


@dataclass(frozen=True)
class PackedEvaluator:
    """Runs an exported `evaluate.pyz` for each call: the very bytes that are handed over.

    Raises UserError where it ends with an error.
    """

    program: Path

    def __call__(self, tokens: torch.Tensor) -> Scores:
        with tempfile.TemporaryDirectory() as scratch:
            text, answer = Path(scratch, "text.bin"), Path(scratch, "scores.npz")
            write_shard(text, tokens.cpu().numpy())
            arguments = [self.program.resolve(), text, "--scores", answer]
            run_evaluator(str(self.program), arguments, Path(scratch), answer)
            with np.load(answer) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays}
        return Scores(found["log_probs"], found["positions"], found["nats"], found["lanes"])


def _check_program(program: Path, shard: Path, reported: Mapping[str, float]) -> Check:
    """Whether the program gives the reported `val_loss` and `val_bpb` for the whole text."""
    printed = run_evaluator(str(program), [program.resolve(), shard.resolve()], program.parent)
    found = json.loads(printed)
    off = {name: abs(found[name] - value) for name, value in reported.items()}
    verdict = FAIL if any(not size <= SCORE_TOLERANCE_NATS for size in off.values()) else PASS
    told = ", ".join(f"{name} {found[name]:.6f} ({value:.6f})" for name, value in reported.items())
    sentence = f"{program.name} gives (reported): {told}."
    return Check("program", verdict if off else NOT_RUN, sentence, found | {"reported": reported})


def _evaluator(parsed: argparse.Namespace) -> Evaluator:
    """In a process of its own for each call, unless told otherwise."""
    if _is_program(parsed.evaluator):
        return PackedEvaluator(Path(parsed.evaluator))
    if not parsed.fresh:
        return load_callable(parsed.evaluator, "--evaluator")
    return FreshEvaluator(parsed.evaluator, Path.cwd())


def _is_program(evaluator: str) -> bool:
    return Path(evaluator).name == PROGRAM


def _check_vocabulary(parsed: argparse.Namespace, tokenizer: SentencePieceProcessor | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size() != parsed.vocab_size:
        raise UserError(
            f"--vocab-size is {parsed.vocab_size}, {parsed.tokenizer} has {tokenizer.vocab_size()} "
            "tokens: give the tokenizer of the text"
        )


def _text_bytes(tokens: np.ndarray, tokenizer: SentencePieceProcessor) -> int:
    return int(token_bytes(tokens.astype(np.int64), byte_counts(tokenizer)).sum(dtype=np.int64))


@dataclass(frozen=True)
class Submission:
    """What is known of a submission beside its evaluator, from options and `--submission`'s folder.

    used, limits: budgets by name. scores: the reported `val_loss` and `val_bpb`, as far as known.
    """

    table: Path | None
    provenance: Path | None
    used: dict[str, float]
    limits: dict[str, float]
    scores: dict[str, float]

    @classmethod
    def read(cls, parsed: argparse.Namespace) -> "Submission":
        """Options count before what lies in the folder. Raises UserError for a file that is told
        and missing, and for a budget that is no `name=number`."""
        folder = parsed.submission
        found: dict[str, Path] = {}
        scores: dict[str, float | None] = {}
        artifacts = list(parsed.artifact)
        if folder is not None:
            author = "the submission's author"
            scores = dict(read_record(Reported, folder / "submission.json", author))
            names = ["tokens.parquet"]
            if not (folder / PROGRAM).is_file():  # an exported folder's ancestors are elsewhere
                names.append("provenance.json")
            found = {name: folder / name for name in names if os.path.lexists(folder / name)}
            artifacts += [path for path in sorted(folder.iterdir()) if path.suffix in COUNTED]
        used, limits = _numbers(parsed.used, "--used"), _numbers(parsed.limits, "--limits")
        if artifacts:
            paths = [require_file(path, "--artifact") for path in artifacts]
            used = {"artifact_bytes": float(sum(path.stat().st_size for path in paths)), **used}
            limits = {"artifact_bytes": float(Budgets().artifact_bytes), **limits}
        told = {"val_loss": parsed.val_loss, "val_bpb": parsed.val_bpb}
        scores |= {name: value for name, value in told.items() if value is not None}
        scores = dict(validated(Reported, scores, "the reported score"))
        return cls(
            table=parsed.table or found.get("tokens.parquet"),
            provenance=parsed.provenance or found.get("provenance.json"),
            used=used,
            limits=limits,
            scores={name: value for name, value in scores.items() if value is not None},
        )

    def evaluation(self, tokens: np.ndarray, byte_total: int | None) -> Evaluation | None:
        """The table of the whole evaluation of `tokens`, integers [n + 1]; None without one."""
        if self.table is None:
            return None
        return read_evaluation(
            self.table, tokens.astype(np.int64), split_bytes=byte_total, metrics=self.scores
        )


def _numbers(pairs: Sequence[str], option: str) -> dict[str, float]:
    numbers = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            numbers[name] = float(text)
        except ValueError:
            raise UserError(f"{option}: found {pair!r}, expected name=number") from None
        if not math.isfinite(numbers[name]):
            raise UserError(f"{option}: found {pair!r}, expected a finite number")
    return numbers


def _optional_callable(name: str | None, option: str) -> Callable | None:
    return None if name is None else load_callable(name, option)


def _geometry(parsed: argparse.Namespace) -> Geometry | None:
    if parsed.window_tokens is None and parsed.stride_tokens is None:
        return None
    if parsed.window_tokens is None or parsed.stride_tokens is None:
        raise UserError("--window-tokens and --stride-tokens aim the flips together: give both")
    return Geometry(parsed.window_tokens, parsed.stride_tokens, parsed.lanes, parsed.batch_windows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fairway audit`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    function = "MODULE:FUNCTION"
    add(
        "--evaluator",
        metavar=function,
        help="tokens [n+1] → log-probabilities [n, V], or an evaluate.pyz; the submission's",
    )
    add("--tokens", required=True, type=Path, metavar="SHARD", help="shard of validation tokens")
    add("--vocab-size", type=int, help="tokens in the vocabulary; the tokenizer's")
    add("--bos-id", type=int, default=1, help="token that starts each document")
    add("--next-token", metavar=function, help="plain model: prefix → log-probabilities [V]")
    add("--base", metavar=function, help="the evaluator without adaptation, to name the track")
    add(
        "--fresh",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="call the evaluator in a new process each time, so that it can keep nothing",
    )
    add("--tokenizer", type=Path, metavar="MODEL", help="counts bytes, and varies replacements")
    submission = parser.add_argument_group("the submission (each feeds a check)")
    told = submission.add_argument
    told(
        "--submission",
        type=Path,
        metavar="FOLDER",
        help="submission.json, artifact and code; tokens.parquet and provenance.json if there",
    )
    told("--table", type=Path, metavar="PARQUET", help="one row a scored target, as tokens.parquet")
    told("--val-loss", type=float, metavar="NATS", help="reported mean, held against the table")
    told("--val-bpb", type=float, metavar="BPB", help="reported score, held against the table")
    told("--artifact", type=Path, nargs="+", default=[], metavar="FILE", help="weights and code")
    budget = "NAME=NUMBER"
    told("--used", nargs="+", default=[], metavar=budget, help="such as evaluation_seconds=455")
    told("--limits", nargs="+", default=[], metavar=budget, help="such as evaluation_seconds=600")
    told("--provenance", type=Path, help="provenance.json of the evaluation")
    geometry = parser.add_argument_group("geometry of the evaluation (aims the flips)")
    geometry.add_argument("--window-tokens", type=int, help="context length of a window")
    geometry.add_argument("--stride-tokens", type=int, help="targets scored by each later window")
    geometry.add_argument("--lanes", type=int, default=1, help="runs of windows side by side")
    geometry.add_argument("--batch-windows", type=int, default=1, help="windows adapted together")
    for name, field in AuditSettings.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": field.annotation}
        add(option, default=field.default, help=field.description, **kind)
    add("--seed", type=int, default=0, help="of the flips and the drawn text")
    add("--output", type=Path, metavar="JSON", help="write audit.json there")
