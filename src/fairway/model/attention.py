"""Causal attention behind one function: the flash_attn family where it is installed, else SDPA.

Shapes: B sequences, T positions, H query heads, K key/value heads, D head width.
"""

import importlib
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from fairway.errors import UserError

# Newest first: FlashAttention 3's interface, flash-attn-4's CuTe interface, flash-attn 2.
FLASH_MODULES = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
    "flash_attn_2": "flash_attn",
}


def available_backends(device: torch.device) -> list[str]:
    """The backends that can run on `device`, best first; `sdpa` is always the last."""
    flash = []
    if device.type == "cuda":
        flash = [name for name, module in FLASH_MODULES.items() if _is_installed(module)]
    return [*flash, "sdpa"]


def select_backend(wanted: str, device: torch.device) -> str:
    """Resolve `runtime.attention` (auto, sdpa, flash_attn) to one backend's name.

    Raises UserError where flash_attn is asked for and cannot run; `auto` takes what there is.
    """
    backends = available_backends(device)
    if wanted == "sdpa":
        return "sdpa"
    if wanted == "flash_attn" and backends[0] == "sdpa":
        raise UserError(
            f"runtime.attention is 'flash_attn' but no flash_attn package serves device "
            f"{device.type!r}: install the `gpu` extra on a CUDA machine, or use 'auto' or 'sdpa'"
        )
    return backends[0]


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, backend: str
) -> torch.Tensor:
    """Causal softmax attention with scale 1/sqrt(D).

    queries [B, T, H, D]; keys, values [B, T, K, D] with K dividing H; returns [B, T, H, D] in the
    dtype of `queries`. The flash backends take bfloat16 and float16 only; other dtypes go
    through SDPA (the model's precision decides, and metrics.json names it).
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            is_causal=True,
            enable_gqa=keys.shape[2] != queries.shape[2],
        ).transpose(1, 2)
    output = importlib.import_module(FLASH_MODULES[backend]).flash_attn_func(
        queries, keys, values, causal=True
    )
    # FlashAttention 3 and 4 return (output, logsumexp), flash-attn 2 the output alone.
    return output[0] if isinstance(output, tuple) else output


def attend_to_cache(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """One new query per sequence over the first `length` entries of a key/value cache.

    queries [B, 1, H, D]; keys, values [B, M, K, D]; length: int64 scalar tensor. → [B, 1, H, D].
    """
    visible = torch.arange(keys.shape[1], device=keys.device) < length
    return F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible.view(1, 1, 1, -1),
        enable_gqa=keys.shape[2] != queries.shape[2],
    ).transpose(1, 2)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
