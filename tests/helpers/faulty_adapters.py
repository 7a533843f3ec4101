"""Adapters with one planted fault each, and one that is watched; configured as `module:Name`."""

from fairway.evaluation.adapters.lora import BatchedLora, Lora
from fairway.evaluation.adapters.ngram import Ngram

STATE = ("values", "mean", "square", "steps")
"""What a lane's additions consist of."""


class LearnsFirst(Lora):
    """The fault: a slice is learned from before it is scored."""

    def adapt(self, batch, logits, scored):
        if batch.step == 0:
            self.lane_starts = batch.first_scored
        super().learn(batch)
        return super().adapt(batch, logits, scored)

    def learn(self, batch):
        pass


class SharedClip(BatchedLora):
    """The fault: the norm is that of all rows together."""

    def update(self, gradient, learns):
        shrunk = (self.settings.gradient_clip / gradient.norm()).clamp(max=1.0)
        super().update(gradient * shrunk, learns)


class SharedGradient(BatchedLora):
    """The fault: rows learn what all of them learn on average, as a shared adapter would."""

    def update(self, gradient, learns):
        super().update(gradient.mean(0).expand_as(gradient), learns)


class OneClip(Lora):
    additions_type = SharedClip


class OneGradient(Lora):
    additions_type = SharedGradient


class FindsItself(Ngram):
    """The fault: a cache finds the target itself."""

    @classmethod
    def prepare(cls, settings, text):
        return [
            cache._replace(
                found={
                    order: found._replace(rank=found.rank + 1, earlier=found.earlier + 1)
                    for order, found in cache.found.items()
                }
            )
            for cache in super().prepare(settings, text)
        ]


class NoAdapter:
    """Another class with settings."""

    Settings = Ngram.Settings


class WatchedAdditions(BatchedLora):
    """Keeps the arguments of every lesson, and the state before and after it."""

    def learn(self, *lesson):
        before = state_of(self)
        super().learn(*lesson)
        Watched.lessons.append((Watched.batch, lesson, before, state_of(self)))


class Watched(Lora):
    """Honest. lessons: (batch, arguments, state before, state after), since it was cleared."""

    additions_type = WatchedAdditions
    lessons: list[tuple] = []  # noqa: RUF012

    def learn(self, batch):
        Watched.batch = batch
        super().learn(batch)


def state_of(additions):
    return {name: getattr(additions, name).detach().clone() for name in STATE}
