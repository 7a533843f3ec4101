"""A text cut into windows, and the windows of one forward pass as a batch.

A *position* is an index of the text. A window's inputs and logits are counted from its start; the
words for that are *offset* and, where the model counts so too, `first_position`.

Shape suffixes: B rows of a forward pass, T tokens of a window, F the first offset whose logits are
needed, V vocabulary, m scored targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairway.evaluation.windows import Windows, WindowSettings, sliding_windows


class LanguageModel(Protocol):
    """What is evaluated: a `GPT`, or anything else that gives logits in this way."""

    kernels: str
    """The formulation that it computes in, "plain" or "fused"; fits then do so too."""

    def __call__(self, tokens: Tensor, first_position: int) -> Tensor:
        """tokens int64 [B, T], offset F → logits float32 [B, T − F, V] of the offsets from F on."""


class Forward(Protocol):
    """A model's forward pass by itself, as it is compiled or captured."""

    def __call__(self, tokens: Tensor, first_position: int) -> Tensor:
        """As `LanguageModel`."""


@dataclass(frozen=True)
class Text:
    """tokens int64 [n + 1] and how they are cut. Everything is on the tokens' device."""

    tokens: Tensor
    windows: Windows
    bos_id: int
    stride_tokens: int

    @cached_property
    def documents(self) -> Tensor:
        """int64 [n + 1], the number of the document that each token lies in: its BOS begins it."""
        return (self.tokens == self.bos_id).cumsum(0)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [windows + 1], each window's first position; the last entry is padding's."""
        return on_device(np.append(self.windows.starts, 0), self.tokens.device)

    @cached_property
    def scored(self) -> Tensor:
        """int64 [windows + 1], how many targets each window scores; the last entry is padding's."""
        return on_device(np.append(self.windows.scored, 0), self.tokens.device)

    def in_document(self, positions: Tensor, documents: Tensor) -> Tensor:
        """Whether each target is predicted from inside `documents`.

        A BOS is predicted from inside the document that it ends.
        """
        return self.documents[(positions - 1).clamp(min=0)] == documents


def cut_text(tokens: Tensor, settings: WindowSettings, bos_id: int) -> Text:
    """Raises UserError where there are fewer than two tokens."""
    windows = sliding_windows(len(tokens) - 1, settings.window_tokens, settings.stride_tokens)
    return Text(tokens, windows, bos_id, settings.stride_tokens)


class WindowBatch:
    """The windows of one forward pass, a row each.

    Rows may be padding, which scores nothing. It keeps the shapes, and so the arithmetic of every
    row, the same from step to step.

    text: what the windows are cut from.
    step: how many passes these lanes have had before.
    index: int64 [B], the windows' numbers; −1 is padding.
    real: bool [B, 1], which rows are not padding. real_rows: int64, their numbers.
    num_windows, num_scored: how many windows the batch has, and how many targets it scores.
    fewest_scored: the smallest number of targets that one of its windows scores.
    first_position: F, the first offset whose logits are needed. It follows from the windows alone,
        never from their tokens, since it changes the shapes.
    row, offset: int64 [m], each scored target's row, and the offset of the logits that score it.
    positions: int64 [m], the scored targets' positions in the text.
    ends: int64 [B, 1], the position of each window's last target.
    first_scored: int64 [B, 1], the position of each window's first scored target.
    slice_documents: int64 [B, 1], the document that this target is predicted from.
    inputs: int64 [B, T], the windows' tokens; padding reads BOS.
    """

    def __init__(
        self, text: Text, step: int, windows: np.ndarray, index: Tensor, needed_positions: int
    ) -> None:
        """windows: int64 [B] on the host. index: the same on the device, so that nothing waits.

        needed_positions: the last positions of a window whose logits are needed, scored or not.
        """
        length = text.windows.length
        counts = text.windows.scored[windows[windows >= 0]]
        self.text, self.step, self.index = text, step, index
        self.num_windows, self.num_scored = len(counts), int(counts.sum())
        self.fewest_scored = int(counts.min())
        # The text's last window may score less than a stride; its shapes are those of the others.
        needed = max(int(counts.max()), text.stride_tokens, needed_positions)
        self.first_position = max(length - needed, 0)

        self.real = (index >= 0).unsqueeze(1)
        self.real_rows = torch.repeat_interleave(self.real[:, 0].long(), output_size=len(counts))
        scored = text.scored[index]
        self.row = torch.repeat_interleave(scored, output_size=self.num_scored)
        seen = torch.arange(self.num_scored, device=index.device)
        seen = seen - (scored.cumsum(0) - scored)[self.row]
        self.offset = seen + (length - scored)[self.row]
        self.ends = (text.starts[index] + length).unsqueeze(1)
        self.positions = self.ends[self.row, 0] - length + self.offset + 1
        self.first_scored = self.ends - scored.unsqueeze(1) + 1
        self.slice_documents = text.documents[self.first_scored - 1]
        self.inputs = self.last_inputs(length)

    @property
    def targets(self) -> Tensor:
        """int64 [m]: the scored tokens themselves, which only `Adapter.learn` may read."""
        return self.text.tokens[self.positions]

    @property
    def in_slice_document(self) -> Tensor:
        """bool [m]: which scored targets belong to the document that their slice begins in."""
        return self.text.in_document(self.positions, self.slice_documents[self.row, 0])

    def last_positions(self, count: int) -> Tensor:
        """int64 [B, count]: the positions of each window's last targets."""
        return self.ends + torch.arange(1 - count, 1, device=self.ends.device)

    def last_inputs(self, count: int) -> Tensor:
        """int64 [B, count]: the last input tokens of each window; padding reads BOS."""
        inputs = self.text.tokens[(self.last_positions(count) - 1).clamp(min=0)]
        return torch.where(self.real, inputs, self.text.bos_id)

    def at_scored(self, logits: Tensor) -> Tensor:
        """The scored targets' logits [m, V] out of a pass's [B, T − F, V]."""
        return logits[self.row, self.offset - self.first_position]

    def score(
        self,
        lanes: Tensor,
        logits: Sequence[Tensor],
        fit_iterations: Tensor | None = None,
        in_own_loss: Tensor | None = None,
    ) -> "ScoredBatch":
        """The batch's scores; lanes: int64 [B], its rows' lanes; else as in `ScoredBatch`."""
        if fit_iterations is None:
            fit_iterations = self.positions.new_zeros(0)
        if in_own_loss is None:
            in_own_loss = torch.zeros_like(self.positions, dtype=torch.bool)
        return ScoredBatch(
            positions=self.positions,
            windows=self.index[self.row],
            lanes=lanes[self.row],
            targets=self.targets,
            logits=tuple(logits),
            in_own_loss=in_own_loss,
            num_windows=self.num_windows,
            fit_iterations=fit_iterations,
        )


@dataclass(frozen=True)
class ScoredBatch:
    """What one forward pass scored, in the order of its rows. Everything is on the tokens' device.

    positions, windows, lanes: int64 [m]; the target's position in the text, its window, its lane.
    targets: int64 [m], the tokens there.
    logits: float32 [m, V] each: the model's own, then those after each adapter in turn.
    in_own_loss: bool [m], whether the target was fitted to by the very fit that scored it.
    num_windows: windows that this pass finished.
    fit_iterations: int64 [fits], the iterations of the fits since the batch before.
    """

    positions: Tensor
    windows: Tensor
    lanes: Tensor
    targets: Tensor
    logits: tuple[Tensor, ...]
    in_own_loss: Tensor
    num_windows: int
    fit_iterations: Tensor

    @property
    def nats(self) -> list[Tensor]:
        """float64 [m] each: the targets' losses under each of `logits`."""
        return [target_nats(logits, self.targets) for logits in self.logits]


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target: log-softmax in float32 of logits [m, V], returned as float64 [m]."""
    log_probs = torch.log_softmax(logits.float(), dim=1)
    return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).double()


def on_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """int64 on `device`."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)
