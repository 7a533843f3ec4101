"""Attention backends: each against float64, and which of them is taken."""

import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.errors import UserError
from fairway.model import attention
from fairway.model.attention import (
    attend,
    attend_to_cache,
    available_backends,
    document_bounds,
    select_backend,
)
from fairway.model.gpt import GPT
from fairway.model.graphs import capture
from trainings import SMALL


def reference(q, k, v, documents=None):
    """Causal attention in float64, with a document number for each key's position."""
    group, missing = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = (part.double().repeat_interleave(group, 2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / math.sqrt(q.shape[-1])
    mask = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()[missing:]
    if documents is not None:
        mask = mask & (documents[:, missing:, None] == documents[:, None])
        mask = mask[:, None]
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", available_backends(torch.device("cpu")))
def test_attention_backend_against_float64(backend, deterministic):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 8, generator=generator)
    k, v = (torch.randn(2, 9, 2, 8, generator=generator) for _ in range(2))
    found = attend(q, k, v, backend, deterministic).double()
    torch.testing.assert_close(found, reference(q, k, v), rtol=1e-5, atol=1e-5)


def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **_):
    """What the flash packages promise, one sequence after the other. Unwritten rows are NaN."""
    output = torch.full_like(q, math.nan)
    for number in range(len(cu_seqlens_k) - 1):
        queries, keys = (slice(*ends[number : number + 2]) for ends in (cu_seqlens_q, cu_seqlens_k))
        if len(q[queries]):
            assert len(q[queries]) <= max_seqlen_q and len(k[keys]) <= max_seqlen_k
            parts = (q[queries][None], k[keys][None], v[keys][None])
            output[queries] = reference(*parts)[0].to(q.dtype)
    return output, None


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_documents_see_themselves_alone_as_masks_and_as_sequences(batch, length, last, seed):
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(batch, length, generator=generator) < 0.3).long().cumsum(1)
    q = torch.randn(batch, min(last, length), 4, 8, generator=generator)
    k, v = (torch.randn(batch, length, 2, 8, generator=generator) for _ in range(2))
    expected = reference(q, k, v, documents)
    fake = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, attention.FLASH_MODULES["flash_attn_4"], fake)
        for backend in ("sdpa", "flash_attn_4"):
            found = attend(q, k, v, backend, documents=documents).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bounds_of_documents_have_a_length_of_their_own_and_never_too_few_places(monkeypatch):
    monkeypatch.setattr(attention, "SPARE_DOCUMENTS", 2)
    documents = torch.tensor([[0, 0, 1, 1], [5, 6, 6, 6]])
    assert document_bounds(documents).tolist() == [0, 2, 4, 5, 8]
    assert document_bounds(torch.zeros(2, 4).long()).tolist() == [0, 4, 8, 8, 8]
    with pytest.raises(RuntimeError, match=r"more than 4 documents .* runtime.attention to sdpa"):
        document_bounds(torch.tensor([[0, 0, 1, 1], [5, 6, 6, 7]]))


def test_a_model_with_document_masks_reads_each_document_as_if_alone():
    config = SMALL.changed(document_masks=True, smear="input", bigram_buckets=0, bos_id=1)
    model = GPT(config, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no part begins as nothing
            parameter += 0.05 * torch.randn(parameter.shape)
    lengths = (5, 1, 9, 7)
    tokens = torch.randint(2, 50, (1, sum(lengths)))
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    tokens[:, firsts[1:]] = 1  # the first text has no beginning, as in the middle of a document
    with torch.no_grad():
        logits = model(tokens)
        alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
        changed = tokens.clone()
        changed[0, 2], changed[0, 8] = 49 - tokens[0, 2], 49 - tokens[0, 8]
        moved = (model(changed) != logits).any(2)[0].nonzero().flatten().tolist()
        assert moved == [2, 3, 4, *range(8, 15)]
        late = model(tokens, first_position=10)
    torch.testing.assert_close(late, logits[:, 10:], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("last", [512, 100])
@pytest.mark.parametrize("backend", available_backends(torch.device("cuda")))
def test_documents_on_a_gpu_in_a_graph_against_float64(backend, last, kv_heads, deterministic):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(tokens, heads):
        shape = (3, tokens, heads, 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    parts = [draw(last, 4), draw(512, kv_heads), draw(512, kv_heads)]
    weight, leaves = draw(last, 4), [part.requires_grad_() for part in parts]

    def compute(documents):
        output = attend(*leaves, backend, deterministic, documents)
        return output.detach(), *torch.autograd.grad(output, leaves, weight)

    def draw_documents(share):
        return (torch.rand(3, 512, generator=generator, device="cuda") < share).long().cumsum(1)

    graph = capture(compute, (draw_documents(0.0),), warm_up_runs=2)
    for share in (0.0, 0.005, 0.02):
        documents = draw_documents(share)
        found = [part.clone() for part in graph(documents)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        output = reference(*exact, documents)
        expected = [output.detach(), *torch.autograd.grad(output, exact, weight.double())]
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < 0.01 * other.norm()
        if deterministic:
            assert all(map(torch.equal, found, graph(documents)))


@pytest.mark.parametrize("masked", [False, True])
def test_a_query_sees_the_part_of_the_cache_that_is_filled(masked):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 1, 6, 8), (3, 16, 2, 8), (3, 16, 2, 8))
    q, k, v = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    documents = torch.randint(2, (3, 16), generator=generator).cumsum(1).to(device)
    for length in (1, 9, 16):
        seen = documents if masked else torch.zeros_like(documents)
        expected = reference(q, k[:, :length], v[:, :length], seen[:, :length])
        filled = torch.tensor(length, device=device)
        found = attend_to_cache(q, k, v, filled, documents if masked else None)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


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


def test_a_backend_that_lacks_a_part_of_itself_is_told_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("import the_compiler_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(attention.FLASH_MODULES, "flash_attn_4", "half_installed")
    with pytest.raises(UserError, match="flash_attn_4 .*No module named 'the_compiler_it_needs'"):
        attention.load_backend("flash_attn_4")


def test_flash_attn_4_comes_without_the_kernels_of_quack_which_stays_whole(tmp_path, monkeypatch):
    files = {
        "quack/__init__.py": "import quack.dsl\nfrom quack.kernels import softmax\n",
        "quack/dsl.py": "",
        "quack/helpers.py": "",
        "quack/kernels.py": "softmax = 'one'\n",
        "cute_of_a_test.py": "import quack.helpers\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(attention.FLASH_MODULES, "flash_attn_4", "cute_of_a_test")
    for name in [name for name in sys.modules if name.partition(".")[0] == "quack"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    try:
        attention.load_backend("flash_attn_4")
        assert set(sys.modules) - before == {"cute_of_a_test", "quack.dsl", "quack.helpers"}
        assert importlib.import_module("quack").softmax == "one"
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
