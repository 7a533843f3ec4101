"""A corpus, a quantizer and an adapter of the user's own, from files outside of the checkout.

They are the worked examples of docs/examples, beside a config in a folder of their own.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from checkouts import (
    ALL,
    SEED,
    copy_checkout,
    from_stage,
    jobs_of,
    project_config,
    snakemake,
)
from fairway.quantization.artifact import read_artifact
from fairway.settings import merge
from tiny import ROOT, synthetic_documents

PLUGINS = ("unigram_cache.py", "leaking_cache.py", "group_int4.py", "text_folder.py")
FOLDERS = {"shared": "train", "leaking": "slot_eval"}
CONFIG = "../ideas/ideas.yaml"


def ideas() -> dict:
    """The config: everything of the tiny one that does not stand for what is replaced."""
    config = project_config()
    corpus = {"source": {"text_folder:TextFolder": {"folder": "../ideas/letters"}}}
    data = {key: value for key, value in config["data"].items() if key not in ("source", "paths")}
    leaking = {"evaluation": {"adapters": ["slot", "leaking_cache:LeakingCache"]}}
    return {
        **merge(config, {"gptq": {"quantizer": {"group_int4:GroupInt4": {"group_columns": 16}}}}),
        "data": {**data, **corpus, "name": "letters"},
        "train": {**config["train"], "late_qat_scale": 0.9},
        "evaluation": {
            **config["evaluation"],
            "adapters": ["slot", {"unigram_cache:UnigramCache": {"weight": 0.1}}],
        },
        "variants": {"causal": {}, "leaking": leaking},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished checkout with the folder `ideas` beside it."""
    root = tmp_path_factory.mktemp("plugins")
    checkout = copy_checkout(root / "checkout")
    letters = root / "ideas/letters"
    letters.mkdir(parents=True)
    for number, text in enumerate(synthetic_documents(60)):
        (letters / f"{number:02}.txt").write_text(text)
    for name in PLUGINS:
        shutil.copyfile(ROOT / "docs/examples" / name, root / "ideas" / name)
    (root / "ideas/ideas.yaml").write_text(yaml.safe_dump(ideas()))
    snakemake(checkout, config=CONFIG)
    return checkout


@pytest.fixture
def checkout(made, tmp_path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(made.parent, tmp_path / "moved") / "checkout"


@pytest.mark.slow
def test_the_artifact_is_made_with_the_users_quantizer_and_read_back(made):
    folder = made / f"results/tiny/seed-{SEED}/shared"
    provenance = json.loads((folder / "gptq/provenance.json").read_text())
    assert list(provenance["settings"]["gptq"]["quantizer"]) == ["group_int4:GroupInt4"]
    _, stored = read_artifact(folder / "gptq/artifact.bin")
    scales = stored["mlp_up_bank"].abs().unflatten(2, (-1, 16)).amax(3) / 7
    codes = (stored["mlp_up_bank"].unflatten(2, (-1, 16)) / scales.unsqueeze(3)).nan_to_num()
    assert (codes - codes.round()).abs().max() < 1e-3
    losses = {
        stage: json.loads((folder / stage / "metrics.json").read_text())["val_loss"]
        for stage in ("ttt", "gptq")
    }
    assert losses["gptq"] != losses["ttt"]


@pytest.mark.slow
def test_the_audit_passes_the_adapter_and_fails_its_leaking_twin(made):
    for folder, verdict in (("shared", "PASS"), ("leaking", "FAIL")):
        path = made / f"results/tiny/seed-{SEED}/{folder}/audit/audit.json"
        assert json.loads(path.read_text())["verdict"] == verdict, path.read_text()


@pytest.mark.slow
def test_the_report_shows_the_adapter_under_its_title_with_its_gain(made):
    report = made / "results/tiny/report"
    page = (report / "report.html").read_text()
    assert "Unigram cache" in page and "Leaking cache" in page
    gains = pd.read_parquet(report / "gains.parquet")
    own = gains[gains.adapter == "unigramcache"]
    assert set(own.variant) == {"causal"} and (own.gain_nats != 0).any()


@pytest.mark.slow
def test_nothing_changed_and_moved_it_reruns_nothing(checkout, dry_runs):
    assert dry_runs.jobs(checkout, config=CONFIG) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        # The leaking twin imports it.
        ("unigram_cache.py", jobs_of(from_stage("slot_eval"), FOLDERS)),
        ("leaking_cache.py", jobs_of(from_stage("slot_eval"), {"leaking": "slot_eval"})),
        ("group_int4.py", jobs_of(from_stage("train"), FOLDERS)),
        ("text_folder.py", jobs_of(ALL, FOLDERS)),
        ("letters/07.txt", jobs_of(ALL, FOLDERS)),
    ],
)
def test_an_edited_plugin_reruns_the_stages_that_run_it(checkout, dry_runs, name, jobs):
    path = checkout.parent / "ideas" / name
    path.write_text(path.read_text() + "\nADDED = 1\n")
    assert dry_runs.jobs(checkout, config=CONFIG) == jobs


@pytest.mark.slow
def test_another_file_of_text_is_another_dataset(checkout, dry_runs):
    (checkout.parent / "ideas/letters/99.txt").write_text("One more letter.")
    assert dry_runs.jobs(checkout, config=CONFIG) == jobs_of(ALL, FOLDERS)


@pytest.mark.slow
def test_a_plugins_key_reruns_its_stages(checkout, dry_runs):
    overlay = 'evaluation={"adapters": {"unigram_cache:UnigramCache": {"weight": 0.2}}}'
    jobs = dry_runs.jobs(checkout, "--config", overlay, config=CONFIG)
    assert jobs == jobs_of(from_stage("slot_eval"), {"shared": "train"})
    code, output = dry_runs.run(
        checkout, "--config", overlay.replace("weight", "wait"), "--configfile", CONFIG
    )
    assert code != 0 and "unknown key wait; did you mean weight?" in output


@pytest.mark.slow
def test_a_builtin_adapter_reruns_the_variants_that_list_it(finished, tmp_path, dry_runs):
    project = shutil.copytree(finished, tmp_path / "lora")
    path = project / "src/fairway/evaluation/adapters/lora.py"
    path.write_text(path.read_text() + "\nADDED = 1\n")
    assert dry_runs.jobs(project) == jobs_of(from_stage("slot_eval"), {"shared": "train"})
