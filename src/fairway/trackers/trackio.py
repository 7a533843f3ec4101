"""Trackio, which keeps all runs in a local folder: `trackio show` looks at them."""

from collections.abc import Mapping
from typing import Any

import trackio

from fairway.trackers.base import PROJECT, Tracker


class Trackio(Tracker):
    """A run of trackio; its environment variables say where, by default on this machine."""

    def __init__(self, run: str, training: str, settings: Mapping[str, Any]) -> None:
        self.record = trackio.init(
            project=PROJECT,
            name=f"{run}/{training}",
            group=run,
            config=dict(settings),
            embed=False,
            # The machine that watches need not be the one that trains.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.record.log(dict(values), step=step)

    def finish(self) -> None:
        self.record.finish()
