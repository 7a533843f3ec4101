"""CUDA graphs: all kernels of a computation launched at once.

A graph spares the processor the launches and the GPU the waits between kernels, which count where
the kernels are small. Training, evaluation and sampling capture here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.phases import phase


@dataclass(frozen=True)
class CapturedGraph:
    """A captured computation: call it with new inputs and get its result.

    The result is the same memory in every call: whoever needs it after the next call, or after a
    call of another graph of the same pool, copies it.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Any

    def __call__(self, *inputs: Tensor) -> Any:
        """Copy `inputs` to where the graph reads them, run it, and return its result."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result


@phase("compile")
def capture(
    compute: Callable[..., Any],
    inputs: Sequence[Tensor] = (),
    *,
    pool: tuple[int, int] | None = None,
    warm_up_runs: int = 0,
    changes: Sequence[Tensor] = (),
) -> CapturedGraph:
    """Capture `compute(*inputs)`, whose shapes and other arguments stay as they are now.

    inputs: tensors that differ between calls; the graph has copies of its own. Whatever else
    `compute` reads, such as parameters, it reads where it lies: new values there are seen.
    pool: of `torch.cuda.graph_pool_handle`, memory that several graphs share; None: its own.
    warm_up_runs: how often `compute` runs before, for compilation and first allocations must not
        be captured; 0 where it has just run.
    changes: tensors that `compute` writes in place; they have their present values afterwards.
    """
    originals = [tensor.clone() for tensor in changes]
    own = tuple(tensor.clone() for tensor in inputs)

    def restore() -> None:
        for tensor, original in zip(changes, originals, strict=True):
            tensor.copy_(original)

    main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(main)
    with torch.cuda.stream(aside):
        for _ in range(warm_up_runs):
            restore()
            compute(*own)
    main.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Errors of this thread alone: NCCL's own may query their events in the meantime.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = compute(*own)
    restore()
    return CapturedGraph(graph, own, result)
