"""The model against slow float64 references of each unusual part, and its parameter count."""

import math
from dataclasses import replace

import pytest
import torch

from fairway.config import load_config
from fairway.errors import UserError
from fairway.model import attention, gpt
from fairway.model.attention import attend, available_backends, select_backend
from fairway.model.gpt import GPT, GPTConfig, config_from_settings
from fairway.model.runtime import RuntimeSettings, prepare, select_kernels
from fairway.model.weights import build_model, load_model, save_model
from tiny import ROOT

CONFIG = GPTConfig(
    vocab_size=50,
    sequence_tokens=24,
    layers=5,
    width=24,
    heads=4,
    kv_heads=2,
    mlp_width=40,
    rotary_dimensions=4,
    rope_base=10000,
    rope_trained_tokens=12,
    bigram_buckets=17,
    bigram_width=6,
    value_width=5,
    value_layers=(3, 4),
    logit_softcap=30.0,
    query_gain=5.0,
)


@pytest.fixture
def model() -> GPT:
    """Random weights everywhere: at its initial values half of the model is invisible."""
    model = GPT(CONFIG, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(3))


def reference_logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """One sequence, position by position and head by head, straight from the description."""
    c, p = model.config, {name: value.detach() for name, value in model.named_parameters()}
    D = c.width // c.heads

    def norm(x):
        return x / torch.sqrt((x**2).mean() + gpt.NORM_EPSILON)

    def rope(x, position):
        base = c.rope_base * (c.sequence_tokens / c.rope_trained_tokens) ** (
            c.rotary_dimensions / (c.rotary_dimensions - 2)
        )
        out, half = x.clone(), c.rotary_dimensions // 2
        for i in range(half):
            angle = position * base ** (-2 * i / c.rotary_dimensions)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos + x[i + half] * sin
            out[i + half] = x[i + half] * cos - x[i] * sin
        return out

    embedded = []
    for t, token in enumerate(tokens):
        if t == 0:
            bucket = c.bigram_buckets - 1
        else:
            bucket = ((36313 * token) ^ (27191 * tokens[t - 1])) % (c.bigram_buckets - 1)
        bigram = p["bigram_projection"] @ p["bigram_embedding"][bucket]
        embedded.append(norm(p["token_embedding"][token] + p["bigram_scale"] * bigram))
    gate = 1 / (1 + torch.exp(-p["smear_gate"]))
    zero = torch.zeros(c.width, dtype=torch.float64)
    xs = [(1 - gate) * h + gate * (embedded[t - 1] if t else zero) for t, h in enumerate(embedded)]
    x0s, skips = list(xs), []
    for layer in range(c.layers):
        if layer >= c.layers // 2 and skips:
            weight, skip = p["skip_weights"][layer - c.layers // 2], skips.pop()
            xs = [x + weight * s for x, s in zip(xs, skip, strict=True)]
        mix = p["residual_mix"][layer]
        us = [mix[0] * x + mix[1] * x0 for x, x0 in zip(xs, x0s, strict=True)]
        s = 1 / math.sqrt(layer + 1)
        queries, keys, values = [], [], []
        for t, u in enumerate(us):
            h = s * norm(u)
            q = (p["query_output_bank"][layer] @ h).view(c.heads, D)
            k = (p["key_value_bank"][layer] @ h).view(c.kv_heads, D)
            v = p["key_value_bank"][c.layers + layer] @ h
            if layer in c.value_layers:
                extra = p["value_projection"] @ p["value_embedding"][tokens[t]]
                scale = p["value_layer_scales"][c.value_layers.index(layer)]
                v = v + scale * p["value_scale"] * extra
            gain = p["query_gain"][layer]
            rotated = [rope(norm(row), t) * g for row, g in zip(q, gain, strict=True)]
            queries.append(torch.stack(rotated))
            keys.append(torch.stack([rope(norm(row), t) for row in k]))
            values.append(v.view(c.kv_heads, D))
        new = []
        for t, u in enumerate(us):
            heads = []
            for head in range(c.heads):
                group = head // (c.heads // c.kv_heads)
                scores = [queries[t][head] @ keys[j][group] / math.sqrt(D) for j in range(t + 1)]
                weights = torch.softmax(torch.stack(scores), 0)
                y = sum(w * values[j][group] for j, w in enumerate(weights))
                unit = values[t][group] / values[t][group].norm()
                heads.append(y - (y @ unit) * unit)
            attention = p["query_output_bank"][c.layers + layer] @ torch.cat(heads)
            x = u + p["attention_scale"][layer] * attention
            up = p["mlp_up_bank"][layer] @ (s * norm(x))
            activated = torch.where(up > 0, up, 0.5 * up) ** 2
            new.append(x + p["mlp_scale"][layer] * (p["mlp_down_bank"][layer] @ activated))
        xs = new
        if layer < c.layers // 2:
            skips.append(list(xs))
    raw = torch.stack([p["token_embedding"] @ norm(x) for x in xs])
    return 30 * torch.tanh(raw / 30)


def test_model_equals_the_float64_reference(model, tokens):
    model.compute_dtype = torch.float64
    logits = model(tokens)
    for row, sequence in zip(logits, tokens, strict=True):
        torch.testing.assert_close(
            row.double(), reference_logits(model, sequence.tolist()), rtol=2e-5, atol=2e-5
        )


def test_every_parameter_matters(model, tokens):
    model.compute_dtype = torch.float64
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_record_config_has_exactly_its_parameters():
    config = load_config([ROOT / "config.yaml", ROOT / "config/record.yaml"])
    with torch.device("meta"):
        model = GPT(
            config_from_settings(
                config["model"], config["data"]["vocab_size"], config["train"]["sequence_tokens"]
            )
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_993_756


def test_later_tokens_change_no_earlier_logits(model, tokens):
    model = model.float()
    with torch.no_grad():
        before = model(tokens)
        changed = tokens.clone()
        changed[:, 10] = (changed[:, 10] + 1) % 50
        after = model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_decoding_with_a_cache_gives_the_same_logits(model, tokens):
    model = model.float()
    with torch.no_grad():
        cache = model.new_cache(batch=2, max_tokens=30)
        steps = [model.decode_step(tokens[:, t], cache) for t in range(tokens.shape[1])]
        torch.testing.assert_close(torch.stack(steps, 1), model(tokens), rtol=1e-4, atol=1e-4)


def test_rotary_base_is_the_records():
    record = replace(
        CONFIG, width=64, sequence_tokens=2048, rope_trained_tokens=1024, rotary_dimensions=16
    )
    assert gpt.rotary_base(record) == pytest.approx(10000 * 2 ** (16 / 14))
    assert gpt.rotary_base(replace(record, sequence_tokens=512)) == 10000


def test_initial_values():
    model = GPT(replace(CONFIG, width=32, vocab_size=4000), seed=0)
    layers = CONFIG.layers
    assert torch.equal(model.query_output_bank[layers:], torch.zeros(layers, 32, 32))
    query = model.query_output_bank[0]
    torch.testing.assert_close(query @ query.T, torch.eye(32), atol=1e-5, rtol=0)
    assert model.token_embedding.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.mlp_down_bank.abs().max() == 0 and model.bigram_embedding.abs().max() == 0
    assert torch.equal(GPT(CONFIG, seed=5).mlp_up_bank, GPT(CONFIG, seed=5).mlp_up_bank)
    assert not torch.equal(GPT(CONFIG, seed=5).mlp_up_bank, GPT(CONFIG, seed=6).mlp_up_bank)


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
    with pytest.raises(UserError, match="half precisions"):
        prepare(GPT(CONFIG), RuntimeSettings("cpu", "plain", "flash_attn", "float32", "off", "off"))


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
    monkeypatch.setattr(attention, "_is_installed", modules.__contains__)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert available_backends(torch.device("cuda")) == expected.split()


def test_logits_from_a_place_on_are_those_of_the_whole(model, tokens):
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, 17), model(tokens)[:, 17:], rtol=1e-12, atol=1e-12)


def test_fused_kernels_cannot_be_forced_where_they_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="runtime.kernels is 'fused' but the device is 'cpu'"):
        select_kernels("fused", torch.device("cpu"))
    assert select_kernels("auto", torch.device("cpu")) == "plain"


def test_cuda_graphs_cannot_be_forced_where_there_is_no_gpu():
    with pytest.raises(UserError, match="runtime.cuda_graphs is 'on'"):
        prepare(GPT(CONFIG), RuntimeSettings("cpu", "plain", "auto", "float32", "off", "on"))


def test_weights_survive_the_file(tmp_path, tokens):
    model = GPT(CONFIG, seed=4)
    save_model(tmp_path / "weights.safetensors", model)
    loaded = load_model(tmp_path / "weights.safetensors")
    assert loaded.config == CONFIG
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))


def test_damaged_or_foreign_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="missing"):
        load_model(path)
    save_model(path, GPT(CONFIG))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_model(path)
    state = GPT(CONFIG).state_dict()
    with pytest.raises(UserError, match="smear_gate"):
        build_model(CONFIG, {k: v for k, v in state.items() if k != "smear_gate"}, "cpu")
