"""Section `gpus`: how many GPUs a machine lends, and how many a job gets."""

from typing import Annotated

from pydantic import Field

from fairway.errors import UserError
from fairway.settings import Settings

Count = Annotated[int, Field(ge=1)]


class GpuSettings(Settings):
    """GPUs for jobs (section `gpus`). No stage reads it, so a change of it reruns nothing.

    Stages that are not named here take one GPU, if they use one at all.
    """

    machine: Count | None = None
    """GPUs of a machine, or of a cluster's node; null: those that CUDA_VISIBLE_DEVICES names, or
    all that are there."""
    train: Count | None = None
    """Of one training, which then reads as many micro-batches at a time; null: all of a machine."""
    ttt: Count | None = 1
    """Of one test-time training before quantization; null: all of a machine."""
    slot_eval: Count | None = None
    """Of one evaluation; null: all of a machine."""

    def of(self, stage: str, machine: int) -> int:
        """How many a job of `stage` gets on a machine of `machine` GPUs, at least one.

        Raises UserError where the machine has fewer.
        """
        machine = max(machine, 1)
        count = getattr(self, stage, 1)
        if count is not None and count > machine:
            raise UserError(
                f"gpus.{stage}: found {count}, but a machine has {machine}: lower it, or set "
                "gpus.machine"
            )
        return count or machine
