"""The hash that decides which stages an edit reruns."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairway.code_hash import PACKAGE, PLUMBING, code_hash, import_closure
from fairway.errors import UserError
from fairway.recipe import complete, plugin_files, section_class
from fairway.settings import merge
from fairway.stages import STAGES
from tiny import ROOT, SCRIPTS, TINY_CONFIG

STAGE_SCRIPTS = sorted(path.name for path in SCRIPTS.glob("*.py"))
CONFIG = merge(TINY_CONFIG, {"data": {"paths": ["text.jsonl"]}})

# A checkout of its own needs a process of its own, which answers a line with a line: the hashes
# before all edits and after each. What is not edited is parsed once for all of them.
HASHES = """
import json, sys
from pathlib import Path
from fairway.code_hash import code_hash
from fairway.plugins import search_beside
from fairway.recipe import complete, plugin_files
from fairway.stages import STAGES

home = Path(sys.argv[1])
search_beside([home])

def hashes(config):
    return {
        name: code_hash(
            home / "workflow/scripts" / stage.script,
            *plugin_files(name, config.stage_settings(name)),
        )
        for name, stage in STAGES.items()
    }

for line in sys.stdin:
    values, edits = json.loads(line)
    config = complete(values)
    found = [hashes(config)]
    for edit in edits:
        before = {name: (home / name).read_text() for name in edit}
        for name, text in edit.items():
            (home / name).write_text(text)
        found.append(hashes(config))
        for name, text in before.items():
            (home / name).write_text(text)
    print(json.dumps(found), flush=True)
"""

LOADED_FILES = """
import json, runpy, sys

loaded = {}
for script in sys.argv[1:]:
    runpy.run_path(script, run_name="imported")
    names = [name for name in sys.modules if name.split(".")[0] == "fairway"]
    loaded[script] = [sys.modules.pop(name).__file__ for name in names]
print(json.dumps(loaded))
"""


class Checkout:
    """A copy of the sources, to edit, and the process that hashes it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("src", "workflow"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, home / name, ignore=ignored)
        self.server = subprocess.Popen(
            [sys.executable, "-c", HASHES, str(home)], env={"PYTHONPATH": str(home / "src")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hashes(self, edits: list[dict[str, str]], **changes) -> list[dict[str, str]]:
        """stage → its hash: before all edits (file → its new text), and after each."""
        print(json.dumps([merge(CONFIG, changes), edits]), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def added(self, name: str, text: str = "\nADDED = 1\n") -> dict[str, str]:
        """The edit that adds `text` to a file."""
        return {name: (self.home / name).read_text() + text}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    one = Checkout(tmp_path_factory.mktemp("checkout"))
    yield one
    one.server.stdin.close()
    one.server.wait()
    one.server.stdout.close()


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def names(stage: str, **changes) -> set[str]:
    """The modules that a stage runs with the tiny configuration, relative to the package."""
    config = complete(merge(CONFIG, changes))
    closure = import_closure(
        SCRIPTS / STAGES[stage].script, *plugin_files(stage, config.stage_settings(stage))
    )
    return {str(path.relative_to(PACKAGE)) for path in closure if PACKAGE in path.parents}


@pytest.mark.slow
def test_the_closure_is_what_python_imports():
    """Whatever of Fairway is loaded by importing a script is in its closure; packages are empty."""
    scripts = [str(SCRIPTS / name) for name in STAGE_SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", LOADED_FILES, *scripts],
        env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded_by_script = json.loads(done.stdout)
    assert len(loaded_by_script) == len(STAGES) == 9
    for script, files in loaded_by_script.items():
        loaded = {Path(file) for file in files}
        packages = {path for path in loaded if path.name == "__init__.py"}
        # The referee's names are looked up when asked for, and no stage asks.
        silent = {PACKAGE / "__init__.py", PACKAGE / "audit/__init__.py"}
        assert not any(path.read_text() for path in packages - silent)
        assert loaded - packages <= set(import_closure(script))


@pytest.mark.parametrize("stage", STAGES)
def test_the_classes_of_a_stages_settings_are_in_its_closure(stage):
    """They are loaded by name while it runs, so imports alone would not show them."""
    files = {
        Path(inspect.getfile(section_class(section)))
        for section in STAGES[stage].sections
        if "." not in section
    }
    numeric = {path for path in files if path.stem not in PLUMBING}
    assert numeric <= set(import_closure(SCRIPTS / STAGES[stage].script))


def test_stages_do_not_share_what_they_need_not():
    run = {stage: names(stage) for stage in STAGES}
    assert "model/gpt.py" in run["train"] and "model/gpt.py" not in run["tokenize"]
    assert "quantization/quantizers/gptq.py" in run["gptq"]
    gptq = {stage for stage in run if "quantization/quantizers/gptq.py" in run[stage]}
    assert gptq == {"gptq"}
    trainer = {stage for stage in run if "training/trainer.py" in run[stage]}
    assert trainer == {"train"}
    for adapter in ("slot", "lora", "ngram"):
        adapting = {stage for stage in run if f"evaluation/adapters/{adapter}.py" in run[stage]}
        assert adapting == {"slot_eval", "audit", "export"}
    for package in ("audit", "report"):
        own = {stage for stage in run if any(one.startswith(f"{package}/") for one in run[stage])}
        assert own <= {"audit", "report"}
    assert not any(one.startswith("data/corpora") for one in run["slot_eval"] | run["audit"])
    assert "data/corpora/jsonl.py" in run["tokenize"]


def test_only_adapters_that_a_config_lists_count():
    listed = names("slot_eval", evaluation={"adapters": ["slot"]})
    assert "evaluation/adapters/slot.py" in listed
    assert not {"evaluation/adapters/lora.py", "evaluation/adapters/ngram.py"} & listed


def test_the_hash_is_that_of_the_meaning_not_of_the_place(checkout):
    home = checkout.home
    comments = {}
    for path in home.rglob("*.py"):
        comments |= checkout.added(str(path.relative_to(home)), "\n\n# A comment.\n")
    trainer = "src/fairway/training/trainer.py"
    text = (home / trainer).read_text()
    field = '"""Length of a sequence."""'
    assert field in text
    described = {trainer: text.replace(field, '"""Tokens of one."""')}
    documented = {trainer: text.replace('"""', '"""Told anew: ', 1)}
    before, *after = checkout.hashes([comments, described, documented])
    assert after == [before] * 3
    settings = complete(CONFIG).stage_settings("train")
    assert before["train"] == code_hash(SCRIPTS / "train.py", *plugin_files("train", settings))


def test_files_may_lie_anywhere(tmp_path):
    """Their order is not that of their folders."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("one", "two"):
            (tmp_path / folder / f"{name}.py").write_text(f"{name} = 1\n")
    hashes = [
        code_hash(tmp_path / first / "one.py", tmp_path / second / "two.py")
        for first, second in ("ab", "ba")
    ]
    assert hashes[0] == hashes[1] != code_hash(tmp_path / "a/one.py")


RERUN = {
    "data/build.py": {"tokenize"},
    "model/gpt.py": {"train", "ema", "ttt", "gptq", "slot_eval", "audit", "export"},
    "training/trainer.py": {"train"},
    "training/selection.py": {"ema"},
    "training/muon.py": {"train"},
    "training/ttt.py": {"ttt"},
    "quantization/quantizers/gptq.py": {"gptq"},
    "evaluation/adapters/slot.py": {"slot_eval", "audit", "export"},
    "evaluation/standalone.py": {"export"},
    "audit/flip.py": {"audit"},
    "report/page.py": {"report"},
    "data/corpora/jsonl.py": {"tokenize"},
    "data/corpora/embedded.py": set(),
    "settings.py": set(),
    "recipe.py": set(),
    "stage.py": set(),
    "metrics.py": set(),
    "cli.py": set(),
}


def test_what_an_edit_reruns(checkout):
    edits = [checkout.added(f"src/fairway/{name}") for name in RERUN]
    before, *after = checkout.hashes(edits)
    rerun = [changed(before, one) for one in after]
    assert dict(zip(RERUN, rerun, strict=True)) == RERUN


QUANTIZER = """
from beside_it import BITS

from fairway.quantization.integers import round_to_nearest
from fairway.quantization.quantizers.base import Quantizer


class Nearest(Quantizer):
    title = "Nearest"
    needs_hessians = False
"""


def test_a_users_class_counts_where_it_runs_with_the_modules_beside_it(checkout):
    (checkout.home / "own_quantizer.py").write_text(QUANTIZER)
    (checkout.home / "beside_it.py").write_text("BITS = 6\n")
    (checkout.home / "unused.py").write_text("BITS = 6\n")
    edits = [
        checkout.added("unused.py"),
        checkout.added("own_quantizer.py", "# A comment.\n"),
        checkout.added("own_quantizer.py"),
        checkout.added("beside_it.py"),
    ]
    before, *after = checkout.hashes(edits, gptq={"quantizer": "own_quantizer:Nearest"})
    own = {"train", "gptq"}  # train for late QAT
    assert [changed(before, one) for one in after] == [set(), set(), own, own]


def test_a_class_whose_file_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'no_such:Adapter' could not be imported"):
        plugin_files("slot_eval", {"evaluation": {"adapters": ["no_such:Adapter"]}})
