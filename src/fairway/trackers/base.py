"""What an experiment tracker is to `fairway watch`, for those who write one.

A tracker of your own is one class in a file of the folder where you give the command:

    fairway watch quickstart --tracker my_tracker:Tracker
"""

from collections.abc import Mapping
from typing import Any

PROJECT = "fairway"
"""What the built-in trackers file all runs under."""


class Tracker:
    """One training, handed on while it goes or afterwards. A subclass has `log`.

    run: the run's name. training: the folder of its training, such as `seed-42/shared`.
    settings: the sections of the train stage, as plain values.
    Whatever it raises ends the watch in one line; the training goes on.
    """

    def __init__(self, run: str, training: str, settings: Mapping[str, Any]) -> None:
        self.run, self.training, self.settings = run, training, settings

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take one row of the curve; steps only rise. values: by the columns of metrics.parquet."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called once, after the last row or where the watch ends."""
