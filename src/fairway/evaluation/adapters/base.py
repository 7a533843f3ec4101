"""What an adapter of the evaluation is, and how to write one.

An adapter changes the distributions that score a text, from what it learned of the text's earlier
tokens. A class of yours in a file of yours is enough:

    class MyCache(Adapter):
        title = "My cache"

        class Settings(Adapter.Settings):
            weight: float = Field(0.1, ge=0, le=1)
            \"""The share of the cache in the mixture.\"""

        def adapt(self, batch, logits, scored): ...
        def learn(self, batch): ...

    evaluation:
      adapters: [lora, {"my_file:MyCache": {weight: 0.2}}]

The rules for a score that counts:

1. *The prefix only.* The distribution of the target at position p may depend on
   `text.tokens[:p]` and on nothing else: not on the target, not on what follows. In `adapt`, leave
   `batch.targets` alone; what a slice's later targets may know of its earlier ones is in
   `text.tokens[:p]` too.
2. *Score first.* State that `learn` writes is read by the batches that follow. `learn` is called
   when the batch's scores are fixed; from then on its targets may be learned from.
3. *Rows must not meet.* The rows of a batch are lanes: other stretches of the same text, some of
   them later ones. What a row learned changes that row's distributions only. So a sum, a norm or a
   step length over rows is a leak; keep state [B, …] and index it with `batch.row`.
4. *The whole distribution.* `scored` are logits over the whole vocabulary, which one softmax
   normalizes. A mixture of probabilities returns their logarithm, and says `is_mixture = True`.

`fairway audit` tests the first three by replacing tokens, and the fourth by adding up. An example
that passes is docs/examples/unigram_cache.py; its twin that fails is leaking_cache.py there.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fairway import settings as fairway_settings
from fairway.evaluation.text import Forward, LanguageModel, ScoredBatch, Text, WindowBatch
from fairway.evaluation.windows import WindowSettings


@dataclass(frozen=True)
class Context:
    """What an adapter may use.

    model: what is evaluated, for an adapter that changes the model itself.
    forward: the model's forward pass, compiled or captured, for one that makes its own passes.
    text: the text and its windows. All of it is there, for the prefix; rule 1 binds the adapter.
    rows: B, the rows of every batch.
    prepared: what the class's `prepare` made of the text.
    seed: of whatever is random.
    """

    model: LanguageModel
    forward: Forward
    text: Text
    rows: int
    prepared: Any
    seed: int


class Adapted(NamedTuple):
    """What an adapter made of a batch.

    logits: float32 [B, T − F, V], those of all the offsets from F on, for the adapters that follow.
    scored: float32 [m, V], those of the scored targets.
    fit_iterations: int64 [fits], how many iterations each of its fits took, if it makes any.
    """

    logits: Tensor
    scored: Tensor
    fit_iterations: Tensor | None = None


class Adapter(ABC):
    """One group of lanes' state. A new object is made for every group of every text."""

    title: ClassVar[str]
    """Its name for people, in the report."""

    is_mixture: ClassVar[bool] = False
    """Whether `scored` becomes the logarithm of mixed probabilities, while a batch's other logits
    stay as they were. Mixtures come after the adapters that change logits."""

    replaces_logits: ClassVar[bool] = False
    """Whether it computes logits anew, without regard to those it is given. It then comes first."""

    class Settings(fairway_settings.Settings):
        """Its settings, all with defaults; nest a subclass of this one."""

        def check_fits(self, windows: WindowSettings) -> None:
            """Raise UserError, naming the keys, where these settings do not fit the windows."""

    def __init__(self, settings: Settings, context: Context) -> None:
        self.settings, self.context = settings, context

    @classmethod
    def prepare(cls, settings: Settings, text: Text) -> Any:
        """What all lanes of a text share, made once: an index of it, for instance."""
        return None

    @classmethod
    def windows_scored_together(cls, settings: Settings) -> int | None:
        """None where the evaluator makes the forward passes, one window of every lane at a time.

        A number says that `score_lane` makes them, and that so many consecutive windows of a lane
        may influence one another before they are scored. No other adapter goes with such a one.
        """
        return None

    @classmethod
    def kernels(cls, settings: Settings, model_kernels: str) -> str:
        """Which formulation it computes in, "plain" or "fused", with a model in `model_kernels`."""
        return "plain"

    def needed_positions(self, step: int) -> int:
        """How many of a window's last positions it needs logits of, besides the scored ones.

        step: how many batches these lanes have had before. The answer may depend on that and on
        the settings, but not on tokens: it changes shapes, and so the arithmetic of every row.
        """
        return 0

    @abstractmethod
    def adapt(self, batch: WindowBatch, logits: Tensor, scored: Tensor) -> Adapted:
        """Change a batch's logits [B, T − F, V] and those of its scored targets [m, V].

        They are the model's, or what the adapter before made of them. Do not write into them.
        """

    def learn(self, batch: WindowBatch) -> None:
        """Take in the batch's targets, each row its own: their scores are fixed now."""
        return None

    def score_lane(self, lane: int, windows: range) -> Iterator[ScoredBatch]:
        """Score a lane's windows, where `windows_scored_together` gives a number."""
        raise NotImplementedError
