"""What the report says of the audits: verdicts, how thorough they were, and where a leak sits."""

import math
from typing import Any

from fairway.audit.interface import FAIL, NOT_APPLICABLE, NOT_RUN, PASS, UNDECIDED
from fairway.audit.result import GRAVITY, AuditRecord
from fairway.report.format import check_title, count, joined, plural, signed
from fairway.report.origin import file_link
from fairway.report.results import Results
from fairway.report.scores import named
from fairway.report.table import Cell, Group, Table
from fairway.report.token_sums import gain_nats, saved_nats

TRACKS = {
    "adaptive": "adaptive (the evaluator changes its predictions as it reads)",
    "fixed": "fixed (the model's own predictions)",
}


def verdict_sentence(results: Results, variant: str) -> str:
    """What the audit says of the score, and how hard it looked."""
    verdict = results.verdict(variant)
    if verdict == FAIL:
        failing = joined(check_title(name).lower() for name in results.checks_with(variant, FAIL))
        return f"failed its audit ({failing}): its number is not a valid score."
    looked = thoroughness(results.audits[variant, results.seeds[0]])
    if verdict != PASS:
        return f"but its audit is incomplete ({looked}), so the score is not yet shown to be valid."
    return f"and passed every check of its audit ({looked})."


def thoroughness(audit: AuditRecord) -> str:
    """Flips, tokens, windows and probes of one audit, and the least leak that they would show."""
    asked = audit.parameters
    flips = [one.evidence.get("flips") for one in audit.checks if one.name == "flip"]
    targets, drawn = asked.get("excerpt_targets"), asked.get("null_tokens")
    told = []
    if targets and flips and all(isinstance(one, int) for one in (targets, *flips)):
        text = f"{count(sum(flips))} tokens replaced in {count(targets)} targets"
        told.append(text + _windows(targets, asked.get("geometry")))
    if audit.detectable_leak_rate_99 is not None:
        told.append(f"a leak at {audit.detectable_leak_rate_99:.0%} of tokens would have shown")
    if drawn and isinstance(drawn, int):
        told.append(f"{count(drawn)} tokens drawn for the null test")
    return "; ".join(told) or "nothing says how thorough"


def _windows(targets: int, geometry: Any) -> str:
    """How many there are, where the evaluator said how it cuts the text."""
    if not isinstance(geometry, dict):
        return ""
    window, stride = (geometry.get(f"{name}_tokens") for name in ("window", "stride"))
    if not (isinstance(window, int) and isinstance(stride, int) and stride > 0):
        return ""
    return f", {count(1 + math.ceil(max(0, targets - window) / stride))} windows"


def verdict_notes(results: Results, variant: str) -> list[str]:
    """Why a variant failed, and what its audit left open."""
    notes = []
    for name in results.checks_with(variant, FAIL):
        quoted, where = _gravest(results, variant, name)
        sentence = results.checks(variant)[name][quoted].sentence
        notes.append(f"{check_title(name)}, {where}. {sentence}")
    for verdict in (UNDECIDED, NOT_RUN):
        if names := results.checks_with(variant, verdict):
            notes.append(f"{verdict.capitalize()}: {', '.join(map(check_title, names))}.")
    return notes


def _gravest(results: Results, variant: str, name: str) -> tuple[int, str]:
    """The first seed with a check's gravest verdict, and which seeds have it, in words."""
    by_seed, ranked = results.checks(variant)[name], (*GRAVITY, NOT_APPLICABLE)
    seed = min(by_seed, key=lambda one: ranked.index(by_seed[one].verdict))
    same = [str(one) for one in by_seed if by_seed[one].verdict == by_seed[seed].verdict]
    if len(same) == len(results.seeds):
        return seed, "every seed"
    return seed, f"{'seeds' if len(same) > 1 else 'seed'} {joined(same)}"


def checks_table(results: Results, variant: str) -> Table:
    """Each check's verdict for each seed, with its audit.json, and the gravest one's words."""
    rows = []
    for name, by_seed in results.checks(variant).items():
        quoted, _ = _gravest(results, variant, name)
        verdicts = [
            Cell(
                verdict=by_seed[seed].verdict,
                link=file_link(results, variant, seed, "audit", "audit.json"),
            )
            if seed in by_seed
            else Cell("–")
            for seed in results.seeds
        ]
        whose = "" if quoted == results.seeds[0] else f"seed {quoted}"
        rows.append([check_title(name), *verdicts, Cell(by_seed[quoted].sentence, detail=whose)])
    audits = [results.audits[variant, seed] for seed in results.seeds]
    meanings = sorted({audit.meaning_of_pass for audit in audits})
    differ = ", which differ" if len(meanings) > 1 else ""
    track = joined(TRACKS.get(track, track) for track in results.tracks(variant))
    seeds = [f"Seed {seed}" for seed in results.seeds]
    return Table(
        variant,
        f"Track: {track}. Thoroughness of each seed’s audit{differ}: {' '.join(meanings)}",
        ["Check", *seeds, f"Finding, seed {results.seeds[0]} unless noted"],
        [Group(rows)],
    )


def audit_line(results: Results, variant: str) -> str:
    """A line for a summary: the verdict, the checks that did not pass, the track."""
    checks = plural(len(results.checks(variant)), "check")
    told = [f"{len(results.checks_with(variant, PASS))} of {checks} pass"]
    told += [note.removesuffix(".") for note in verdict_notes(results, variant)]
    told.append(thoroughness(results.audits[variant, results.seeds[0]]))
    return f"{variant}: {results.verdict(variant)}. {'; '.join(told)}"


def attribution_table(results: Results) -> Table:
    """Mean over seeds of the gain, split by whether targets were in the loss of their own delta."""
    groups = []
    for variant in results.variants:
        parts = [
            results.tokens[variant, seed].by_own_loss.reindex([False, True])
            for seed in results.seeds
        ]
        mean = sum(parts[1:], parts[0]).fillna(0) / len(parts)
        saved, gains, tokens = saved_nats(mean), gain_nats(mean), mean["tokens"].sum()
        rows = [
            [
                "in the loss of their own delta" if own else "not in that loss",
                f"{mean['tokens'][own] / tokens:.1%}",
                signed(gains[own]),
                signed(saved[own] / tokens),
            ]
            for own in (True, False)
        ]
        total = signed(saved.sum() / tokens)
        groups.append(Group([*rows, ["all", "100.0%", total, total]], named(results, variant)))
    return Table(
        "Gain by membership in the delta’s loss",
        "The gain of adaptation in nats per token, split by whether the scored target was in the "
        "loss of the delta that scored it. Contribution: the group’s gain spread over all targets.",
        ["Targets", "#Share", "#Gain of each", "#Contribution"],
        groups,
    )
