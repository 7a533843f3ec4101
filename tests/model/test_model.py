"""The model against slow float64 references of each unusual part, and the reference submission."""

import json
import math
from pathlib import Path

import pytest
import torch

from fairway.model.functional import NORM_EPSILON, rotary_base
from fairway.model.gpt import GPT
from fairway.model.spec import GPTConfig, block_of_rows, parameters
from trainings import ALL_FEATURES, FEATURES, SMALL, random_model

GOLDEN = json.loads((Path(__file__).parent / "golden_pr1350.json").read_text(encoding="utf-8"))


@pytest.fixture(params=[SMALL, ALL_FEATURES], ids=["", "all features"])
def model(request) -> GPT:
    return random_model(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """A few documents in each row; the token 1 begins one."""
    tokens = torch.randint(2, 50, (2, 24), generator=torch.Generator().manual_seed(3))
    tokens[0, [0, 5, 14]] = tokens[1, 3] = 1
    return tokens


def reference_logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """One sequence, position by position and head by head, straight from the description."""
    c, p = model.config, {name: value.detach() for name, value in model.named_parameters()}
    D = c.width // c.heads

    def norm(x):
        return x / torch.sqrt((x**2).mean() + NORM_EPSILON)

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

    def sigmoid(x):
        return 1 / (1 + torch.exp(-x))

    embedded = [p["token_embedding"][token] for token in tokens]
    for t, token in enumerate(tokens if c.bigram_buckets else ()):
        if t == 0:
            bucket = c.bigram_buckets - 1
        else:
            bucket = ((36313 * token) ^ (27191 * tokens[t - 1])) % (c.bigram_buckets - 1)
        bigram = p["bigram_projection"] @ p["bigram_embedding"][bucket]
        embedded[t] = embedded[t] + p["bigram_scale"] * bigram
    zero = torch.zeros(c.width, dtype=torch.float64)
    xs = [norm(e) for e in embedded]
    if c.smear == "channel":
        gate = sigmoid(p["smear_gate"])
        xs = [(1 - gate) * x + gate * (xs[t - 1] if t else zero) for t, x in enumerate(xs)]
    elif c.smear == "input":
        for t, e in enumerate(embedded):
            if t and tokens[t] != c.bos_id:
                gate = p["smear_scale"] * sigmoid(p["smear_weights"] @ e[: c.smear_dimensions])
                xs[t] = norm(e + gate * embedded[t - 1])
    begins = [
        max((j for j in range(t + 1) if tokens[j] == c.bos_id), default=0)
        for t in range(len(tokens))
    ]
    run = list(c.recurrent_layers)
    steps = [layer for layer in range(c.layers) if not run or layer < run[0]]
    steps += run * (c.recurrence_passes if model.recurs else 1)
    steps += [layer for layer in range(c.layers) if run and layer > run[-1]]
    x0s, skips = list(xs), []
    for step, layer in enumerate(steps):
        if step >= len(steps) // 2 and skips:
            row, skip = step - len(steps) // 2, skips.pop()
            skip = [p["skip_weights"][row] * s for s in skip]
            if c.skip_gates:
                gate = sigmoid(p["skip_gate"][row])
                xs, skip = [gate * x for x in xs], [(1 - gate) * s for s in skip]
            xs = [x + s for x, s in zip(xs, skip, strict=True)]
        mix = p["residual_mix"][layer]
        us = [mix[0] * x + mix[1] * x0 for x, x0 in zip(xs, x0s, strict=True)]
        s = 1 / math.sqrt(layer + 1)
        queries, keys, values, gates = [], [], [], []
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
            n = c.head_gate_dimensions
            gates.append(sigmoid(0.5 * p["head_gate"][layer] @ h[:n]) if n else [1.0] * c.heads)
        new = []
        for t, u in enumerate(us):
            heads = []
            for head in range(c.heads):
                group = head // (c.heads // c.kv_heads)
                seen = range(begins[t] if c.document_masks else 0, t + 1)
                scores = [queries[t][head] @ keys[j][group] / math.sqrt(D) for j in seen]
                weights = torch.softmax(torch.stack(scores), 0)
                y = sum(w * values[j][group] for j, w in zip(seen, weights, strict=True))
                unit = values[t][group] / values[t][group].norm()
                heads.append(gates[t][head] * (y - (y @ unit) * unit))
            attention = p["query_output_bank"][c.layers + layer] @ torch.cat(heads)
            x = u + p["attention_scale"][layer] * attention
            up = p["mlp_up_bank"][layer] @ (s * norm(x))
            activated = torch.where(up > 0, up, c.activation_slope * up) ** 2
            new.append(x + p["mlp_scale"][layer] * (p["mlp_down_bank"][layer] @ activated))
        xs = new
        if step < len(steps) // 2:
            skips.append(list(xs))
    raw = torch.stack([p["token_embedding"] @ norm(x) for x in xs])
    above, below = p["softcaps"] if c.asymmetric_softcap else (c.logit_softcap, c.logit_softcap)
    return torch.where(raw > 0, above * torch.tanh(raw / above), below * torch.tanh(raw / below))


def test_model_equals_the_float64_reference(model, tokens):
    assert_equals_the_reference(model, tokens)


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_equals_the_float64_reference(name, tokens):
    assert_equals_the_reference(random_model(FEATURES[name]), tokens[:1, :9])


def assert_equals_the_reference(model, tokens):
    model.compute_dtype = torch.float64
    logits = model(tokens)
    for row, sequence in zip(logits, tokens, strict=True):
        torch.testing.assert_close(
            row.double(), reference_logits(model, sequence.tolist()), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["config"]["layers"]))
def test_logits_are_those_of_the_reference_submissions_code(case):
    """Weights and tokens follow the rules that the file states."""
    config = GPTConfig(**case["config"])
    model = GPT(config).double()
    model.compute_dtype = torch.float64
    for j, (name, parameter) in enumerate(sorted(model.named_parameters())):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.2 * torch.sin(0.37 * (i + 1) * (j + 1)) + (0.6 if name in NEAR_ONE else 0.0)
        parameter.data = values.view(parameter.shape)
    i = torch.arange(config.sequence_tokens)
    tokens = (7 * i * i + 3 * i + 1) % config.vocab_size
    with torch.no_grad():
        logits = model(tokens[None])[0, case["positions"], :12].double()
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


# Of these the golden file's rule adds 0.6 to the sines.
NEAR_ONE = (
    "attention_scale", "mlp_scale", "skip_weights", "query_gain", "value_layer_scales",
    "value_scale", "bigram_scale", "residual_mix",
)  # fmt: skip


def test_the_defaults_are_the_reference_submission_with_exactly_its_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_993_756


def test_every_parameter_matters(model, tokens):
    model.compute_dtype = torch.float64
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", [n for n, p in parameters(ALL_FEATURES).items() if p.per_block])
def test_a_blocks_rows_are_those_that_it_alone_depends_on(name, tokens):
    """The last block's: what it changes, no earlier block can feel."""
    model = random_model(ALL_FEATURES)
    model.compute_dtype = torch.float64
    inputs: dict[tuple[str, int], torch.Tensor] = {}

    def note(bank, index, x):
        inputs.setdefault((bank, index), x.clone())

    model.activation_hook = note
    last = SMALL.layers - 1
    with torch.no_grad():
        before = model(tokens), {**inputs}
        inputs.clear()
        rows = [row for row, block in enumerate(block_of_rows(name, model.config)) if block == last]
        getattr(model, name)[rows] += 0.1
        after = model(tokens), inputs
    assert not torch.equal(before[0], after[0])
    for bank, index in before[1]:
        if block_of_rows(bank, model.config)[index] < last:
            assert torch.equal(before[1][bank, index], after[1][bank, index]), (bank, index)


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


def test_rotary_base_is_the_reference_submissions():
    assert rotary_base(GPTConfig()) == pytest.approx(10000 * 2 ** (16 / 14))
    assert rotary_base(GPTConfig(sequence_tokens=512)) == 10000


def test_initial_values():
    model = GPT(SMALL.changed(width=32, vocab_size=4000), seed=0)
    layers = SMALL.layers
    assert torch.equal(model.query_output_bank[layers:], torch.zeros(layers, 32, 32))
    query = model.query_output_bank[0]
    torch.testing.assert_close(query @ query.T, torch.eye(32), atol=1e-5, rtol=0)
    assert model.token_embedding.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.mlp_down_bank.abs().max() == 0 and model.bigram_embedding.abs().max() == 0
    assert torch.equal(model.residual_mix[:, 0], torch.ones(layers, 32))
    assert torch.equal(model.residual_mix[:, 1], torch.zeros(layers, 32))
    assert torch.equal(GPT(SMALL, seed=5).mlp_up_bank, GPT(SMALL, seed=5).mlp_up_bank)
    assert not torch.equal(GPT(SMALL, seed=5).mlp_up_bank, GPT(SMALL, seed=6).mlp_up_bank)


def test_logits_from_a_position_on_are_those_of_the_whole(model, tokens):
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, 17), model(tokens)[:, 17:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, ALL_FEATURES], ids=["", "all features"], indirect=True)
def test_a_compiled_model_computes_the_same(model, tokens):
    model = model.float()
    with torch.no_grad():
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-4)
