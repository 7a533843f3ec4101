"""The library as others install it: a wheel, outside the checkout."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tiny import ROOT, TINY_CONFIG

pytestmark = pytest.mark.slow

# Isolated (-I): neither the working directory nor PYTHONPATH is searched. The test environment's
# packages serve as dependencies; its own Fairway, an editable install, comes after the wheel's.
SCRIPT = """
import json, sys
from pathlib import Path

site, run, dataset = map(Path, sys.argv[1:])
sys.path.insert(0, str(site))

import fairway
from fairway.audit.runner import AuditSettings, audit
from fairway.data.dataset import load_dataset, read_split
from fairway.data.tokenizer import load_tokenizer
from fairway.evaluation.evaluator import Evaluator
from fairway.evaluation.settings import EvaluationSettings
from fairway.evaluation.token_table import table_metrics
from fairway.quantization.artifact import load_artifact
from fairway.recipe import complete
from fairway.report import page
from fairway.report.tables import read_run

model = load_artifact(run / "seed-7/shared/gptq/artifact.bin")
tokenizer = load_tokenizer(dataset / "tokenizer.model")
settings = EvaluationSettings(window_tokens=32, stride_tokens=8, lanes=1, adapters=["slot"])
evaluator = Evaluator(model, settings, bos_id=tokenizer.bos_id())
table = evaluator.score_documents(["To be, or not to be."], tokenizer)
result = audit(
    lambda tokens: evaluator.distributions(tokens).log_probs,
    read_split(load_dataset(dataset / "manifest.json"), "val"),
    vocab_size=tokenizer.vocab_size(),
    settings=AuditSettings(flips=2, stream_tokens=40),
)
config = complete({"seeds": [1], "data": {"name": "text", "source": "embedded"}})
files = [module.__file__ for name, module in sys.modules.items() if name.startswith("fairway.")]
print(json.dumps({
    "files": [file for file in files if file],
    "val_bpb": table_metrics(table)["val_bpb"],
    "fails": result.names("FAIL"),
    "rows": len(read_run(run).stages),
    "width": config.sections("causal")["model"].width,
    "template": (Path(page.__file__).parent / "page.html.j2").is_file(),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network, from a copy that git knows nothing of: setuptools leaves files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "src").rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and ".egg-info" not in str(path):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", folder / "dist", ".", cwd=folder)  # fmt: skip
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
        "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)  # fmt: skip
    return folder


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/fairway").rglob("*")
        if path.suffix in (".py", ".j2")
    }
    assert "fairway/report/page.html.j2" in sources
    held = {name for name in names if ".dist-info/" not in name}
    assert held == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_where_it_is_installed(site, tiny_run, tiny_dataset, tmp_path):
    printed = run(
        sys.executable, "-I", "-c", SCRIPT, site, tiny_run, tiny_dataset.parent, cwd=tmp_path
    )
    found = json.loads(printed.splitlines()[-1])
    assert TINY_CONFIG["seeds"] == [7]
    assert all(Path(file).is_relative_to(site) for file in found["files"])
    assert len(found["files"]) > 30
    assert 0 < found["val_bpb"] < 16
    assert found["fails"] == []
    assert found["rows"] > 0
    assert found["width"] == 512
    assert found["template"]


def test_its_command_works(site, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from fairway.cli import main; main()"
    printed = run(sys.executable, "-I", "-c", code, "audit", "--help", cwd=tmp_path)
    assert "--evaluator" in printed and "--stream-tokens" in printed
