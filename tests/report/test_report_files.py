"""The report believes no file for its place: damaged, swapped and forged ones are refused."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

import malformed_products
from fairway.errors import UserError
from fairway.files import sha256_of
from fairway.report.content import page_content
from fairway.report.settings import ReportSettings
from fairway.report.tables import make_tables, read_run
from malformed_products import kept, outcome_of, time_limit, with_odd_value
from provenance_chain import edit
from synthetic_run import load_results, make_report, make_run, reseal
from trainings import run_here

SEEDS = (1337, 42)
READ = ("metrics.json", "provenance.json", "metrics.parquet", "artifact.bin", "tokens.parquet",
        "audit.json", "reach.parquet")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of two seeds and two variants."""
    return make_run(tmp_path_factory.mktemp("run"), SEEDS)


def seed_folder(root: Path, seed: int = 42) -> Path:
    return root / f"results/quickstart/seed-{seed}"


def refusal(root: Path) -> str:
    with time_limit(), pytest.raises(UserError) as caught:
        load_results(root, SEEDS)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    return line


def test_a_passing_audit_over_a_failing_one_is_refused(root):
    failing = seed_folder(root) / "leaky/audit/audit.json"
    with kept(failing):
        shutil.copy(seed_folder(root) / "shared/audit/audit.json", failing)
        line = refusal(root)
    assert f"{failing} has changed since it was made" in line
    assert "run `snakemake --cores 2 --forcerun audit`" in line


def test_nor_is_it_believed_with_records_that_fit(tmp_path):
    """Not its own record's word, nor with the records of all files made to fit."""
    make_run(tmp_path, SEEDS)
    passing, failing = (seed_folder(tmp_path) / name / "audit" for name in ("shared", "leaky"))
    shutil.rmtree(failing)
    shutil.copytree(passing, failing)
    assert "leaky/audit was not made from" in refusal(tmp_path)
    record, leaky = failing / "provenance.json", seed_folder(tmp_path) / "leaky"
    inputs = json.loads(record.read_text())["inputs"]
    needed = [path for stage in ("ttt", "gptq", "slot_eval") for path in (leaky / stage).iterdir()]
    others = [path for path in needed if path.name != "artifact.bin"]
    edit(record, inputs=inputs | {str(path): sha256_of(path) for path in others})
    assert "leaky/gptq/artifact.bin; expected the files made by the audit" in refusal(tmp_path)
    edit(record, inputs=inputs | {str(path): sha256_of(path) for path in needed})
    assert "leaky/audit/metrics.json is of seed 42 and folder 'shared'" in refusal(tmp_path)
    forge(failing / "metrics.json", folder="leaky")
    assert "leaky/audit/audit.json is of seed 42 and folder 'shared'" in refusal(tmp_path)
    forge(failing / "audit.json", variant="leaky", verdict="FAIL")
    assert "found the verdict FAIL, expected the gravest of its checks'" in refusal(tmp_path)


def forge(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(path)


def test_no_file_of_another_seed_variant_or_stage_is_taken(root):
    paths = sorted(path for name in READ for path in root.glob(f"results/quickstart/*/*/*/{name}"))
    contents, chance = {path: path.read_bytes() for path in paths}, Random(0)
    for path in paths:
        others = [other for other in paths if contents[other] != contents[path]]
        of_its_name = [other for other in others if other.name == path.name]
        of_its_format = [other for other in others if other.suffix == path.suffix]
        for other in (*of_its_name[:4], *chance.choices(of_its_format, k=2)):
            with kept(path):
                path.write_bytes(contents[other])
                assert str(path.parent) in refusal(root), other


@pytest.mark.parametrize("stage", ["train", "ttt", "gptq", "slot_eval", "audit"])
def test_no_folder_of_another_seed_or_variant_is_taken(root, tmp_path, stage):
    own = seed_folder(root) / "shared" / stage
    own.rename(tmp_path / "own")
    try:
        for base in (seed_folder(root, 1337) / "shared", seed_folder(root) / "leaky"):
            if (base / stage).is_dir():
                shutil.copytree(base / stage, own)
                assert str(own.parent) in refusal(root)
                shutil.rmtree(own)
    finally:
        (tmp_path / "own").rename(own)
    load_results(root, SEEDS)


def test_an_audit_that_could_not_decide_is_shown_as_that(tmp_path):
    make_run(tmp_path, SEEDS)
    path = seed_folder(tmp_path) / "shared/audit/audit.json"
    audit = json.loads(path.read_text())
    audit["checks"][0]["verdict"] = audit["verdict"] = "UNDECIDED"
    path.write_text(json.dumps(audit))
    reseal(path)
    assert load_results(tmp_path, SEEDS).verdict("causal") == "UNDECIDED"


def test_another_artifact_than_the_audited_one_is_refused(root):
    """Nothing on the page is of the artifact itself, but the verdict is about it."""
    artifact = seed_folder(root) / "shared/gptq/artifact.bin"
    with kept(artifact):
        artifact.write_bytes(b"another")
        assert "artifact.bin has changed since it was made" in refusal(root)


def test_another_dataset_than_the_scored_one_is_refused(root):
    manifest = root / "results/data/embedded/manifest.json"
    with kept(manifest):
        manifest.write_text(manifest.read_text().replace("synthetic", "other"))
        assert f"{manifest} has changed since" in refusal(root)


def test_forged_records_of_odd_types_end_in_one_line(tmp_path):
    """Hashes that fit prove no shape; what is of the right types may be shown."""
    make_run(tmp_path, SEEDS)
    paths = sorted(tmp_path.glob("results/quickstart/seed-42/*/*/*.json"))
    outcomes = []
    for seed in range(30):
        chance = Random(seed)
        path = chance.choice(paths)
        with kept(path):
            values = with_odd_value(json.loads(path.read_text()), chance)
            path.write_text(json.dumps(values))
            if path.name != "provenance.json":
                reseal(path)
            outcome, told = outcome_of(lambda: shown(tmp_path), b"")
        assert outcome != "traceback", (seed, path, told)
        outcomes.append(outcome)
        if path.name != "provenance.json":
            reseal(path)
    assert outcomes.count("refused") > 15


def shown(root: Path) -> bytes:
    results = load_results(root, SEEDS)
    page_content(results, make_tables(results, ReportSettings()), ReportSettings())
    return b"the page"


def test_the_tables_are_read_as_the_report_wrote_them(root):
    report = make_report(root, SEEDS, figures=False)
    path = report / "gains.parquet"
    with kept(path):
        shutil.copy(report / "budgets.parquet", path)
        with pytest.raises(UserError, match=r"gains.parquet has changed since it was made"):
            read_run(report.parent)
    (report / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"provenance.json is missing.*the report stage"):
        read_run(report.parent)


# A real run, of the tiny model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens.parquet", "provenance.json", "metrics.json"])
def test_the_script_says_it_in_one_line_and_loses_nothing(tiny_run, name, capsys):
    config, report = tiny_run.parents[1] / "tiny.yaml", tiny_run / "report"
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    path = tiny_run / "seed-7/shared/slot_eval" / name
    with kept(path):
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(SystemExit) as ended:
            run_here("report.py", "--config", config, "--run", tiny_run, "--output", report)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} ") and "slot_eval" in line
    assert before == {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "tries", [pytest.param(80, marks=pytest.mark.slow), pytest.param(4000, marks=pytest.mark.many)]
)
def test_damage_is_refused_or_changes_nothing(tiny_run, tries):
    found = list(malformed_products.tries(tiny_run, seed=tries, count=tries))
    assert not [one for one in found if one.outcome not in ("right", "refused")]
    outcomes = [one.outcome for one in found]
    assert outcomes.count("refused") > 0.7 * tries and outcomes.count("right") > 0


def test_nothing_is_written_where_the_datasets_record_is_refused(tmp_path):
    make_run(tmp_path, SEEDS)
    (record,) = tmp_path.glob("results/data/*/provenance.json")
    record.unlink()
    record.mkdir()
    with pytest.raises(UserError, match="provenance.json"):
        make_report(tmp_path, SEEDS)
    assert not list(tmp_path.rglob("*.svg"))
