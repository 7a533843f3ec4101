"""Attention backends: each against float64, and which of them is taken."""

import math

import pytest
import torch

from fairway.errors import UserError
from fairway.model import attention
from fairway.model.attention import attend, available_backends, select_backend


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", available_backends(torch.device("cpu")))
def test_attention_backend_against_float64(backend, deterministic):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 8, generator=generator)
    k, v = (torch.randn(2, 9, 2, 8, generator=generator) for _ in range(2))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, 2))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    weights = (scores / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, v.double().repeat_interleave(2, 2))
    found = attend(q, k, v, backend, deterministic).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_cannot_be_forced_where_it_is_absent():
    with pytest.raises(UserError, match="runtime.attention"):
        select_backend("flash_attn", torch.device("cpu"))
    assert select_backend("auto", torch.device("cpu")) == "sdpa"


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        (("flash_attn_2", "flash_attn_4"), (9, 0), "flash_attn_4 cudnn flash_attn_2 sdpa"),
        (("flash_attn_3",), (9, 0), "cudnn flash_attn_3 sdpa"),
        (("flash_attn_2",), (8, 0), "flash_attn_2 sdpa"),
        ((), (8, 0), "sdpa"),
    ],
)
def test_what_is_fastest_goes_first(monkeypatch, installed, capability, expected):
    modules = {attention.FLASH_MODULES[name] for name in installed}
    monkeypatch.setattr(attention, "is_installed", modules.__contains__)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert available_backends(torch.device("cuda")) == expected.split()
