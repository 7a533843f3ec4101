"""Damaged files end in a dataset or in one line; tests/helpers/malformed_data.py says how."""

import pytest

from malformed_data import run


@pytest.mark.parametrize("count", [240, pytest.param(6_000, marks=pytest.mark.many)])
def test_damage_is_refused_in_one_line_or_makes_a_dataset(tmp_path, count):
    counts = run(tmp_path, seed=count, count=count)
    print(dict(counts))
    assert counts["traceback"] == 0
    assert counts["refused"] > count / 2 and counts["accepted"] > 0
