"""report.html and summary.md, put together as plain text and tables; the template has the looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fairway.audit.lineage import Overlap
from fairway.files import sha256_of_json
from fairway.report.audits import (
    attribution_table,
    audit_line,
    checks_table,
    verdict_notes,
    verdict_sentence,
)
from fairway.report.captions import captions
from fairway.report.configuration import changes_table, setting_facts
from fairway.report.format import badge, count, joined, mean_and_std, plural, quantity
from fairway.report.kept import Kept
from fairway.report.origin import (
    commands_to_reproduce,
    identity,
    kept_table,
    provenance_table,
    seeds_left_out,
)
from fairway.report.quantization import quantization_table
from fairway.report.results import FINAL_STAGE, Results
from fairway.report.scores import (
    adaptation_table,
    adapters_table,
    between_variants_tables,
    differences_by_stage_table,
    headline_table,
    seed_heads,
    stages_table,
    summary_row,
)
from fairway.report.settings import ReportSettings
from fairway.report.table import Cell, Group, Table, as_markdown
from fairway.report.tables import RunTables, reference_of, variants_by_text

BUDGET_TITLES = {
    "artifact_bytes": "Artifact, code and weights",
    "training_seconds": "Reading training data",
    "evaluation_seconds": "Evaluation",
}
FEW_WINDOWS = 5
"""An adapter learns in one window for the next; in fewer there is no next to speak of."""


def page_content(
    results: Results, tables: RunTables, settings: ReportSettings, kept: Sequence[Kept] = ()
) -> dict[str, Any]:
    """All that the template prints, section by section. kept: older reports."""
    against = reference_of(results, settings)
    several = len(results.variants) > 1
    return {
        "run": results.run,
        "lede": [_lede(results, tables.summary, variant) for variant in results.variants],
        "facts": _facts(results),
        "cautions": cautions(results),
        "headline": headline_table(results, tables, settings, against),
        "verdict_notes": {
            variant: notes
            for variant in results.variants
            if (notes := verdict_notes(results, variant))
        },
        "notes": [*byte_notes(results), _baseline_note(settings)],
        "changes": changes_table(results, against) if several else None,
        "between": [
            differences_by_stage_table(results, against),
            *between_variants_tables(results, tables.comparisons),
        ]
        if several
        else [],
        "comparison_notes": _comparison_notes(results, against),
        "stages": stages_table(results),
        "adapters": adapters_table(results),
        "adaptation": adaptation_table(results, tables.comparisons),
        "quantization": quantization_table(results),
        "audits": [
            {
                "badge": badge(results.verdict(variant)),
                "open": results.has_few_variants or results.failed(variant),
                "table": checks_table(results, variant),
            }
            for variant in results.variants
        ],
        "attribution": attribution_table(results),
        "budgets": _budgets_table(results, tables.budgets),
        "setting_facts": setting_facts(results, against),
        "settings_of": against if several else "",
        "provenance": provenance_table(results),
        "identity": (found := identity(results)),
        "commands": commands_to_reproduce(found["checkout"]),
        "kept": kept_table(kept) if kept else None,
        "captions": captions(results),
        "tables": list(vars(tables)),
    }


def summary_markdown(results: Results, tables: RunTables, settings: ReportSettings) -> str:
    """A summary to be pasted into a pull request."""
    against = reference_of(results, settings)
    found = identity(results)
    lines = [
        f"## {results.run}",
        *(f"- **{name}**: {text}" for name, text in _facts(results)),
        *(f"- {text}" for text in cautions(results)),
        "",
        as_markdown(headline_table(results, tables, settings, against)),
        "",
        "**Every stage and seed**",
        "",
        as_markdown(stages_table(results)),
        "",
        "**Each adapter**",
        "",
        as_markdown(adapters_table(results)),
        "",
        "**Audit**",
        "",
        *(f"- {audit_line(results, variant)}" for variant in results.variants),
    ]
    if len(results.variants) > 1:
        lines += ["", "**Settings**", "", as_markdown(changes_table(results, against))]
    lines += [
        "",
        f"Commit {'; '.join(found['commits'])}; settings SHA-256 {found['settings_sha256'][:12]}. "
        "With the report’s config.yaml as reproduced.yaml:",
        "",
        *(f"    {command}" for command in commands_to_reproduce(found["checkout"])),
    ]
    return "\n".join(lines) + "\n"


def about(results: Results, tables: RunTables, settings: ReportSettings) -> dict[str, Any]:
    """What the report adds to its metrics.json."""
    own = settings.model_dump(mode="json")
    return {
        "seeds": sorted(results.seeds),
        "scores": {
            variant: float(summary_row(tables.summary, variant, "val_bpb")["mean"])
            for variant in sorted(results.variants)
        },
        "verdicts": {variant: results.verdict(variant) for variant in sorted(results.variants)},
        "settings_sha256": sha256_of_json([identity(results)["settings_sha256"], own]),
    }


def _lede(results: Results, summary: pd.DataFrame, variant: str) -> dict[str, str]:
    score = summary_row(summary, variant, "val_bpb")
    number = mean_and_std(score["mean"], score["std"])
    text = f"scored {number} bits per byte over {plural(len(results.seeds), 'seed')}"
    return {
        "variant": variant,
        "score": "" if results.failed(variant) else text,
        "meaning": verdict_sentence(results, variant),
    }


def _facts(results: Results) -> list[tuple[str, str]]:
    scored, overlaps = {}, {}
    for variant, dataset in results.datasets.items():
        sums = results.tokens[variant, results.seeds[0]]
        overlap, total = results.manifests[variant].overlap, sums.total()
        scored[dataset] = (
            f"{plural(len(sums.by_document), 'document')}, {count(total['tokens'])} tokens, "
            f"{count(total['bytes'])} bytes"
        )
        overlaps[dataset] = str((overlap and Overlap(**overlap.model_dump())) or "not checked")
    devices = sorted({metrics["device"] for metrics in results.metrics.values()})
    return [
        ("Data", ", ".join(scored)),
        ("Scored on", "; ".join(_by_name(scored))),
        ("Overlap", "; ".join(_by_name(overlaps))),
        ("Seeds", ", ".join(map(str, results.seeds))),
        ("Machine", "; ".join(devices)),
    ]


def _by_name(texts: Mapping[str, str]) -> list[str]:
    """What is said of each dataset, by its name where there are several."""
    return [text if len(texts) == 1 else f"{name}: {text}" for name, text in texts.items()]


def byte_notes(results: Results) -> list[str]:
    """How val_bpb would change by the bytes of the text before the tokenizer normalized it."""
    notes = {}
    for variant, dataset in results.datasets.items():
        original = results.manifests[variant].original
        counted = results.tokens[variant, results.seeds[0]].total()["bytes"]
        if original is None:
            text = "How many bytes the text had before normalization is not known."
        elif not original.validation.changed_documents:
            bytes_ = count(original.validation.bytes)
            text = f"Tokens decode to the text exactly as it was, all {bytes_} bytes of it."
        else:
            change = counted / original.validation.bytes - 1
            text = (
                f"The text had {count(original.validation.bytes)} bytes before normalization; "
                f"its tokens decode to {count(counted)}. Per original byte val_bpb is "
                f"{abs(change):.2%} {'lower' if change < 0 else 'higher'}."
            )
        notes[dataset] = text
    return _by_name(notes)


def cautions(results: Results) -> list[str]:
    """What is to be known of the scored text and of the seeds, a sentence each."""
    found = seeds_left_out(results)
    several = len(set(results.datasets.values())) > 1
    for variant in results.variants:
        told = results.manifests[variant].warnings
        found += [f"{results.datasets[variant]}: {text}" if several else text for text in told]
        windows = results.metrics[variant, results.seeds[0], FINAL_STAGE]["windows"]
        if windows < FEW_WINDOWS:
            found.append(
                f"{variant} was scored in {plural(windows, 'window')}: what adaptation gains in "
                f"fewer than {FEW_WINDOWS} says little."
            )
    return list(dict.fromkeys(found))


def _baseline_note(settings: ReportSettings) -> str:
    if settings.baseline is None:
        return "No baseline is configured (report.baseline), so no test against one is shown."
    return (
        f"Baseline: {settings.baseline.name}, {plural(len(settings.baseline.losses), 'seed')}. The "
        "difference is that of mean losses in nats per token, negative is better; p is Welch’s "
        f"one-sided test that the gain exceeds {settings.minimum_gain_nats} nats, and ✓ marks p "
        f"below {settings.significance}."
    )


def _comparison_notes(results: Results, against: str) -> list[str]:
    notes = []
    groups = variants_by_text(results)
    if len(groups) > 1:
        texts = "; ".join(map(joined, groups))
        notes.append(f"Only variants that scored the same documents are compared: {texts}.")
    notes.append(
        f"The others are held against {against}; report.against names another, and fairway compare "
        "takes any two."
    )
    return notes


def _budgets_table(results: Results, budgets: pd.DataFrame) -> Table:
    rows = []
    for (variant, name), group in budgets.groupby(["variant", "budget"], sort=False):
        limit, most, unit = group["limit"].iloc[0], group["used"].max(), group["unit"].iloc[0]
        used = [quantity(one, unit) for one in group["used"]]
        verdict = Cell("within") if most <= limit else Cell(warning="over the limit")
        share = f"{most / limit:.1%}"
        rows.append([variant, BUDGET_TITLES[name], *used, quantity(limit, unit), share, verdict])
    return Table(
        "Budgets",
        "Use: the largest of the seeds.",
        ["Variant", "Budget", *seed_heads(results), "#Limit", "#Use", "Verdict"],
        [Group(rows)],
    )
