"""One training and one average that several tests read."""

import pytest

from trainings import run_here, train_arguments


@pytest.fixture(scope="session")
def trained(tiny_config_file, tiny_dataset, tmp_path_factory):
    """Folder of the uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("trained")
    run_here("train.py", *train_arguments(tiny_config_file, tiny_dataset, folder))
    return folder / "train"


@pytest.fixture(scope="session")
def averaged(trained, tiny_config_file, tiny_dataset, tmp_path_factory):
    """Folder of the weights that ema chose."""
    folder = tmp_path_factory.mktemp("averaged") / "ema"
    run_here(
        "ema.py", "--config", tiny_config_file, "--seed", 7, "--tokenize", tiny_dataset.parent,
        "--train", trained, "--output", folder,
    )  # fmt: skip
    return folder
