"""One synthetic run and its report, for all that read them."""

import pytest

from synthetic_run import make_report, make_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run and its report's folder."""
    root = make_run(tmp_path_factory.mktemp("run"))
    return root, make_report(root)
