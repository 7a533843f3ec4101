"""Tutorial and guides, followed: files are written and commands given as the pages show them."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from checkouts import ENVIRONMENT, TEXT, copy_checkout, project_config
from fairway.settings import merge
from pages import blocks, commands, shown_file
from tiny import ROOT, synthetic_documents, write_jsonl
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

FOLLOWED = ["first_experiment", "guides/compare", "guides/hand_over", "guides/own_text"]
"""Pages in the order in which a reader may take them: later ones use what earlier ones made."""
PROGRAMS = {"snakemake": ["-m", "snakemake"], "fairway": ["-m", "fairway.cli"], "python": []}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A clone whose quickstart is tiny, with text of a user's own."""
    folder = copy_checkout(tmp_path / "fairway")
    documents = synthetic_documents(60)
    for name in (TEXT, "documents.jsonl", "data/validation.jsonl.xz", "data/train.jsonl.xz"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder / name, documents)
    recipe = merge(project_config(), {"recipe": "quickstart", "data": {"name": "embedded"}})
    del recipe["run"], recipe["seeds"]
    (folder / "config/quickstart.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def follow(name: str, folder: Path, *options: str) -> None:
    """Do in `folder` what a page says; options: more ones of each call of Snakemake."""
    output = ""
    for kind, text in blocks(ROOT / f"docs/{name}.md"):
        if file := shown_file(text):
            (folder / file[0]).write_text(file[1], encoding="utf-8")
        elif kind == "python" and "results/" in text:
            output = give(["python", "-c", text], folder)
        elif kind == "sh":
            for words in commands(text):
                more = options if words[0] == "snakemake" else ()
                output = give([*words, *more], folder) if words[0] in PROGRAMS else ""
        elif kind == "text":  # what was just given prints this, with something left out at each …
            parts = [" ".join(part.split()) for part in text.split("…")]
            said = " ".join(output.split())
            assert all(part in said for part in parts), output


def give(words: list[str], folder: Path) -> str:
    """The output of a command; that of an audit which must fail has status 1."""
    done = subprocess.run(
        [warm_python(), *PROGRAMS[words[0]], *words[1:]],
        cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": "src"}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    must_fail = any(word.endswith(("_faulty", ":leaking")) for word in words)
    assert done.returncode == int(must_fail), f"{' '.join(words)}\n{done.stdout[-4000:]}"
    return done.stdout


def test_tutorial_and_guides_do_what_they_say(checkout):
    for name in FOLLOWED:
        follow(name, checkout)
    results = checkout / "results"
    for product in (
        "quickstart/seed-42/strong_prior/audit/audit.json",
        "quickstart/seed-42/shared/export/submission.json",
        "mine/report/report.html",
    ):
        assert (results / product).is_file()
    assert (checkout / "comparison.html").is_file()


def test_scripts_are_audited_as_the_guide_says(checkout):
    follow("guides/audit_a_script", checkout)


def test_runs_on_gpus_and_slurm_are_planned_as_the_guide_says(checkout):
    is_without_slurm = find_spec("snakemake_executor_plugin_slurm") is None
    follow("guides/gpus_and_slurm", checkout, "-n", *(["--executor", "local"] * is_without_slurm))
