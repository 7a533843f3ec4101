"""What the report says of settings and of the audit's thoroughness, and its summary."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fairway.recipe import complete, load_config
from fairway.report.audits import thoroughness, verdict_sentence
from fairway.report.configuration import config_of, config_text, own_modules
from fairway.report.content import summary_markdown
from fairway.report.origin import seeds_left_out
from fairway.report.settings import ReportSettings
from fairway.report.tables import make_tables
from fairway.stages import stages_of_a_run
from synthetic_run import load_results
from tiny import ROOT, TINY_CONFIG

RECIPES = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))
CONFIGS = {
    **{name: {"recipe": name, "seeds": [1, 2]} for name in RECIPES},
    "tiny": {**TINY_CONFIG, "data": {**TINY_CONFIG["data"], "paths": ["text.jsonl"]}},
    "sweep": {
        "recipe": "quickstart", "seeds": [1], "variants": {"causal": None, "x": {}},
        "sweep": {"gptq.dampening_fraction": [0.002, 1e-5], "ttt.data": ["none", "train"]},
    },
}  # fmt: skip


def as_told(config, variant):
    """The sections that a variant's stages are told, as the records have them."""
    sections = {}
    for stage in stages_of_a_run():
        if stage.name != "report":
            for name, values in config.stage_settings(stage.name, variant).items():
                sections.setdefault(name, {}).update(values)
    return sections


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_that_a_report_leaves_tells_every_stage_the_same(name, tmp_path):
    config = complete(CONFIGS[name])
    sections = {variant: as_told(config, variant) for variant in config.variants}
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config_of(config.run, config.seeds, sections)), encoding="utf-8")
    again = load_config([path])
    assert (again.run, again.seeds, list(again.variants)) == (
        config.run, config.seeds, list(config.variants),
    )  # fmt: skip
    assert {variant: as_told(again, variant) for variant in again.variants} == sections


def test_modules_of_the_users_own_are_found_in_a_config():
    adapters = [{"my.cache:Cache": {"weight": 0.1}}, {"slot": {"scope": "window"}}]
    sections = {"evaluation": {"adapters": adapters}, "gptq": {"quantizer": "int4:Group"}}
    text = config_text(config_of("mine", [1], {"causal": sections}))
    assert own_modules(text) == ["int4", "my.cache"]


def test_the_page_has_the_config_and_the_started_command(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    config = yaml.safe_load((finished[1] / "config.yaml").read_text(encoding="utf-8"))
    assert config["seeds"] == [1337, 42, 2025] and set(config["variants"]) == {"causal", "leaky"}
    assert "Started with" not in page  # nobody typed a command
    assert "1,000,000 parameters" in page and "300 steps, 1,228,800 tokens" in page


def test_a_pass_says_how_thorough_the_audit_was(finished):
    results = load_results(finished[0])
    audit = results.audits["causal", 42]
    asked = {
        "excerpt_targets": 2432, "null_tokens": 2048,
        "geometry": {"window_tokens": 256, "stride_tokens": 64},
    }  # fmt: skip
    flip = replace(audit.checks[0], evidence={"flips": 16})
    full = audit.model_copy(update={"parameters": asked, "checks": [flip, *audit.checks[1:]]})
    told = thoroughness(full)
    assert told.startswith("16 tokens replaced in 2,432 targets, 35 windows; a leak at 54% of")
    assert told.endswith("2,048 tokens drawn for the null test")
    results = replace(results, audits=results.audits | {("causal", results.seeds[0]): full})
    assert told in verdict_sentence(results, "causal")
    assert told not in verdict_sentence(results, "leaky")


def test_the_summary_is_markdown_with_each_score_beside_its_verdict(finished):
    results, settings = load_results(finished[0]), ReportSettings()
    text = summary_markdown(results, make_tables(results, settings), settings)
    assert text.count("| causal | **PASS** (adaptive) |") == 1
    rows = [line for line in text.splitlines() if line.startswith("| leaky")]
    assert re.fullmatch(r"\| leaky \| \*\*FAIL\*\* .* \| ~~1\.\d{4} ± .*~~ not a valid.*", rows[0])
    widths: list[int] = []
    for line in text.splitlines():
        widths = [*widths, line.count("|")] if line.startswith("|") else []
        assert len(set(widths)) <= 1, line


def test_seeds_that_are_not_in_the_numbers_are_named(finished):
    root = finished[0]
    assert seeds_left_out(load_results(root)) == []
    told = seeds_left_out(load_results(root, (42,)))
    assert told == [
        f"Seed {seed} is not in these numbers: it is finished, but was not asked for."
        for seed in (1337, 2025)
    ]
    run: Path = root / "results/quickstart"
    moved = run / "seed-2025/shared/ema"
    log = run / "logs/seed-2025/shared/ema.log"
    moved.rename(run / "away")
    try:
        told = seeds_left_out(load_results(root, (42, 1337)))
        assert told == ["Seed 2025 is not in these numbers: no ema of it."]
        log.parent.mkdir(parents=True)
        log.write_text("a line\nerror: loss is nan at step 7\n")
        (line,) = seeds_left_out(load_results(root, (42, 1337)))
        assert line.endswith("its ema ended with “error: loss is nan at step 7”.")
    finally:
        (run / "away").rename(moved)
