"""Causal attention behind one function: the flash_attn family's, cuDNN's or PyTorch's own.

Shapes: B sequences, T positions, H query heads, K key/value heads, D head width.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairway.errors import UserError

FLASH_MODULES = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
    "flash_attn_2": "flash_attn.flash_attn_interface",  # flash-attn-4 brings `flash_attn` as well
}
"""The modules of FlashAttention 3, flash-attn-4 (its CuTe interface) and flash-attn 2."""

# flash-attn-4 compiles for seconds, and keeps that for later processes only if it is asked to. Its
# own choice of a folder, in the one for everybody's temporary files, is not for code to be run.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
os.environ.setdefault(
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(Path("~/.cache/flash_attn_4").expanduser())
)

HOPPER = (9, 0)
"""Compute capability of the first GPUs on which cuDNN's attention is faster than PyTorch's own."""

BACKENDS = ("flash_attn_4", "cudnn", "flash_attn_3", "flash_attn_2", "sdpa")
"""`auto` takes the first of these that can run. The first two and the last were measured on an
H200: docs/log.md, 2026-11-24."""


SLOW_TO_LOAD = "flash_attn_4"
"""It brings a compiler, which a process imports for some seconds (docs/log.md, 2026-11-26)."""


def load_ahead(wanted: str, brief: bool) -> None:
    """Import SLOW_TO_LOAD if `select_backend` will choose it on a GPU; CUDA is not used yet."""
    if is_installed(FLASH_MODULES[SLOW_TO_LOAD]):
        for name in _serving(wanted, [SLOW_TO_LOAD], brief):
            load_backend(name)


def load_backend(name: str) -> None:
    """Import what a backend needs, which is otherwise done where it is first called.

    Raises UserError where a part of it is missing.
    """
    if name not in FLASH_MODULES:
        return
    try:
        with _quack_without_kernels() if name == "flash_attn_4" else nullcontext():
            importlib.import_module(FLASH_MODULES[name])
    except ImportError as error:
        raise UserError(
            f"runtime.attention: {name} is installed but cannot be imported ({error}): install the "
            "`gpu` extra anew, or set it to cudnn or sdpa"
        ) from error


@contextmanager
def _quack_without_kernels() -> Iterator[None]:
    """Within, importing a part of quack, whose helpers flash-attn-4 uses, leaves its kernels out.

    quack's own `__init__` imports them with PyTorch's compiler, which takes twice as long as all
    the rest and asks CUDA for the GPU. Whoever imports quack later gets the whole of it.
    """
    spec = None if "quack" in sys.modules else find_spec("quack")
    if spec is None:
        yield
        return
    sys.modules["quack"] = module_from_spec(spec)
    try:
        importlib.import_module("quack.dsl")  # the part of `__init__` that changes CuTe
        yield
    finally:
        del sys.modules["quack"]


def available_backends(device: torch.device) -> list[str]:
    """The backends that can run on `device`; `auto` takes the first."""
    if device.type != "cuda":
        return ["sdpa"]
    runs = {"sdpa", *(name for name, module in FLASH_MODULES.items() if is_installed(module))}
    if torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= HOPPER:
        runs.add("cudnn")
    return [name for name in BACKENDS if name in runs]


def select_backend(wanted: str, device: torch.device, brief: bool = False) -> str:
    """Resolve `runtime.attention` (auto, sdpa, cudnn, flash_attn) to one backend's name.

    brief: whether there is little to compute, so that `auto` does not take SLOW_TO_LOAD.
    Raises UserError where the one asked for cannot run.
    """
    backends = available_backends(device)
    serving = _serving(wanted, backends, brief)
    if not serving:
        raise UserError(
            f"runtime.attention is {wanted!r} but the backends for device {device.type!r} are "
            f"{', '.join(backends)}: use 'auto' or one of these (flash_attn comes with the `gpu` "
            "extra, cudnn needs a Hopper GPU or newer)"
        )
    return serving[0]


def _serving(wanted: str, backends: Sequence[str], brief: bool) -> list[str]:
    """Those of `backends` that `wanted` and `brief` allow, in their order."""
    if wanted == "auto":
        return [name for name in backends if not (brief and name == SLOW_TO_LOAD)]
    return [name for name in backends if name.startswith(wanted)]


def key_copies(backend: str, queries_per_key: int) -> int:
    """How many copies of each key and value head `attend` should get where gradients are wanted.

    flash-attn-4 adds up the gradients of a shared key in float32, in memory that it clears before
    and converts afterwards. With a key for each query it writes them as they are.
    """
    return queries_per_key if backend == "flash_attn_4" else 1


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    backend: str,
    deterministic: bool = False,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention with scale 1/sqrt(D); the queries are those of the last Q positions.

    queries [B, Q, H, D]; keys, values [B, T, K, D] with Q ≤ T and K dividing H; returns
    [B, Q, H, D] in the dtype of `queries`. cuDNN and the flash backends take bfloat16 and float16
    only; other dtypes go through SDPA (the model's precision decides, and metrics.json names it).
    deterministic: the gradient is the same in every run; else a GPU may add in any order.
    documents: int64 [B, T], a number for each position, which never decreases along T; a position
    sees those with its own number only. The flash backends allow TOKENS_PER_DOCUMENT for it.
    """
    if backend in FLASH_MODULES:
        return _flash(queries, keys, values, FLASH_MODULES[backend], deterministic, documents)
    forced = SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else None
    first_position = keys.shape[1] - queries.shape[1]
    options = {"is_causal": True}
    if first_position or documents is not None:
        # A mask, for is_causal would align the first positions. PyTorch chooses what runs it.
        forced = None
        positions = torch.arange(keys.shape[1], device=keys.device)
        visible = positions <= positions[first_position:, None]
        if documents is not None:
            same = documents[:, None] == documents[:, first_position:, None]
            visible = (visible & same).unsqueeze(1)
        options = {"attn_mask": visible}
        if keys.is_cuda:  # no kernel that takes a mask takes keys shared between query heads
            group = queries.shape[2] // keys.shape[2]
            keys, values = (part.repeat_interleave(group, dim=2) for part in (keys, values))
    if deterministic and keys.is_cuda:
        if "is_causal" in options and queries.dtype != torch.float32:
            return DeterministicFlash.apply(queries, keys, values)
        forced = SDPBackend.MATH
    with sdpa_kernel(forced) if forced else nullcontext():
        return _scaled_dot_product(queries, keys, values, **options)


def _flash(queries, keys, values, module: str, deterministic, documents) -> torch.Tensor:
    flash = importlib.import_module(module)
    options = {"causal": True, "deterministic": deterministic}
    if documents is None:
        output = flash.flash_attn_func(queries, keys, values, **options)
    else:
        bounds = document_bounds(documents)
        length, last = documents.shape[1], queries.shape[1]
        row, position = bounds // length, bounds % length
        output = flash.flash_attn_varlen_func(
            *(part.flatten(0, 1) for part in (queries, keys, values)),
            cu_seqlens_q=row * last + (position - (length - last)).clamp(min=0),
            cu_seqlens_k=bounds,
            max_seqlen_q=last,
            max_seqlen_k=length,
            **options,
        )
    # FlashAttention 3 and 4 return (output, logsumexp), flash-attn 2 the output alone.
    output = output[0] if isinstance(output, tuple) else output
    return output.view(queries.shape)


TOKENS_PER_DOCUMENT, SPARE_DOCUMENTS = 128, 64


def document_bounds(documents: torch.Tensor) -> torch.Tensor:
    """Where each document of each sequence begins in all B·T positions, ascending; int32 [S + 1].

    documents: as `attend` takes them. S depends on the shape alone, so that a CUDA graph can
    capture what follows: it is B + B·T / TOKENS_PER_DOCUMENT + SPARE_DOCUMENTS, and the bounds that
    are left over are B·T, for documents without a token. More documents are an error, which on a
    GPU is a failed assertion of the device.
    """
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    most = len(documents) + begins.numel() // TOKENS_PER_DOCUMENT + SPARE_DOCUMENTS
    numbers = torch.arange(1, most + 2, device=documents.device)
    bounds = torch.searchsorted(begins.cumsum(0), numbers)
    torch._assert_async(
        bounds[-1] == begins.numel(),
        f"more than {most} documents in sequences of {tuple(documents.shape)} tokens: set "
        "runtime.attention to sdpa, or model.document_masks to false",
    )
    return bounds.int()


class DeterministicFlash(torch.autograd.Function):
    """PyTorch's flash attention, half precisions only, with a backward pass that repeats itself.

    PyTorch's global switch for determinism fixes the order of the pass's sums. It is on during the
    pass only: other operations, such as products under cuBLAS's default workspace, would refuse to
    run.
    """

    @staticmethod
    def forward(ctx, queries, keys, values):
        inputs = [part.detach().requires_grad_() for part in (queries, keys, values)]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = _scaled_dot_product(*inputs, is_causal=True)
        ctx.joined = output, inputs
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        output, inputs = ctx.joined
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return torch.autograd.grad(output, inputs, gradient)
        finally:
            torch.use_deterministic_algorithms(before)


def _scaled_dot_product(queries, keys, values, **options) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        enable_gqa=keys.shape[2] != queries.shape[2],
        **options,
    ).transpose(1, 2)


def attend_to_cache(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """One new query per sequence over the first `length` entries of a key/value cache.

    queries [B, 1, H, D]; keys, values [B, M, K, D]; length: int64 scalar tensor; documents: int64
    [B, M], where a query sees those of the last entry's document only. → [B, 1, H, D].
    """
    visible = torch.arange(keys.shape[1], device=keys.device) < length
    if documents is not None:
        visible = visible & (documents == documents.index_select(1, length[None] - 1))
    mask = visible.view(-1, 1, 1, keys.shape[1])
    if not keys.is_cuda:
        return _scaled_dot_product(queries, keys, values, attn_mask=mask)
    # No kernel that takes a mask takes keys shared between query heads, so the heads that share
    # one stand as its positions: nothing of the cache is copied.
    grouped = queries.squeeze(1).unflatten(1, (keys.shape[2], -1)).transpose(1, 2)
    output = _scaled_dot_product(grouped, keys, values, attn_mask=mask)
    return output.transpose(1, 2).flatten(1, 2).unsqueeze(1)


def is_installed(module: str) -> bool:
    """Whether `module` could be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
