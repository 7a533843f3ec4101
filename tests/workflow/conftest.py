"""One tiny run that is made for real, and the dry runs that ask about it."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from checkouts import dry_jobs, dry_run, make_project, snakemake


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A project whose results are all there, one for all of pytest-xdist's workers; read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    # So that every command is tried with a space, a quote and foreign letters in its paths.
    folder, done = root / "it's a проект", root / "project is finished"
    with FileLock(root / "project.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_project(folder)
            snakemake(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def empty(tmp_path_factory) -> Path:
    """A project without results; read only."""
    return make_project(tmp_path_factory.mktemp("empty") / "project")


@pytest.fixture(scope="session")
def dry_runs() -> SimpleNamespace:
    """Which jobs Snakemake would run in a folder."""
    return SimpleNamespace(run=dry_run, jobs=dry_jobs)


@pytest.fixture
def project(finished, tmp_path) -> Path:
    """A copy of the finished project, to be changed: a moved checkout with its mtimes."""
    return shutil.copytree(finished, tmp_path / "проект's moved", symlinks=True)
