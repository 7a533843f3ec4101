"""The whole workflow, stopped at random times and resumed.

That it can be stopped in every stage is test_resume_command.py's.
"""

import pytest

from killed_workflows import workflow_tries


@pytest.mark.many
def test_a_killed_workflow_ends_in_the_bytes_of_one_that_was_not(tmp_path):
    (tried,) = workflow_tries(tmp_path, seed=1, count=1)
    assert not tried.is_fault, tried
