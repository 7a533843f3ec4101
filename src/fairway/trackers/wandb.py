"""Weights & Biases: offline for who is not logged in, so that no account is needed."""

import os
from collections.abc import Mapping
from typing import Any

import wandb

from fairway.trackers.base import PROJECT, Tracker


class Wandb(Tracker):
    """A run of wandb; WANDB_MODE and its other environment variables count.

    `wandb sync` sends what was kept offline.
    """

    def __init__(self, run: str, training: str, settings: Mapping[str, Any]) -> None:
        chosen = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        self.record = wandb.init(
            project=PROJECT,
            name=f"{run}/{training}",
            group=run,
            config=dict(settings),
            mode=None if chosen else "offline",
            reinit="create_new",  # one for each training, all at once
            # The machine that watches need not be the one that trains.
            settings={"console": "off", "x_disable_stats": True},
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.record.log(dict(values), step=step)

    def finish(self) -> None:
        self.record.finish()
