"""The model as the reference submission (PR #1350) runs it: plain PyTorch for torch.compile.

One module per block, each step its own operation; a block is handed its matrices out of the banks.
Weights are float32 and are cast to the compute dtype in every forward pass. Logits are float32
for all positions and go through F.cross_entropy. Attention is SDPA.

    loss = torch.compile(model.loss, dynamic=False, fullgraph=True)

Shapes: B sequences, T positions, C width, H query heads, K key/value heads, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairway.errors import UserError
from fairway.model.functional import (
    NORM_EPSILON,
    VALUE_NORM_EPSILON,
    bigram_bucket,
    rotary_base,
)
from fairway.model.gpt import GPT
from fairway.model.spec import BANKS, GPTConfig


@contextmanager
def baseline_attention(device: torch.device) -> Iterator[None]:
    """SDPA by its flash backend on CUDA, as the reference submission sets it.

    It stands outside what is compiled: the backend is chosen while the graph is traced.
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPSILON)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2·half dimensions; x [B, H, T, D], cos and sin [T, half]."""
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with query and key norms, and exclusive self-attention after it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query_gain = nn.Parameter(torch.empty(config.heads))

    def forward(self, x, query, key, value, output, value_embedding, cos, sin):
        B, T, C = x.shape
        q = F.linear(x, query).view(B, T, self.heads, -1).transpose(1, 2)
        k = F.linear(x, key).view(B, T, self.kv_heads, -1).transpose(1, 2)
        v = F.linear(x, value)
        if value_embedding is not None:
            v = v + value_embedding
        v = v.view(B, T, self.kv_heads, -1).transpose(1, 2)
        q, k = rotate_half(norm(q), cos, sin), rotate_half(norm(k), cos, sin)
        q = q * self.query_gain.to(q.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads
        )
        own = F.normalize(v, dim=-1, eps=VALUE_NORM_EPSILON).unsqueeze(2)
        y = y.view(B, self.kv_heads, -1, T, y.size(-1))
        y = y - (y * own).sum(-1, keepdim=True) * own
        y = y.reshape(B, self.heads, T, -1).transpose(1, 2).reshape(B, T, C)
        return F.linear(y, output)


class MLP(nn.Module):
    """Up, leaky ReLU squared, down."""

    def forward(self, x, up, down):
        hidden = F.leaky_relu(F.linear(x, up), negative_slope=0.5)
        return F.linear(hidden.square(), down)


class Block(nn.Module):
    """Residual mix, attention, MLP; its matrices come with each call."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.depth_scale = (layer + 1) ** -0.5
        self.attention, self.mlp = Attention(config), MLP()
        self.residual_mix = nn.Parameter(torch.empty(2, config.width))
        self.attention_scale = nn.Parameter(torch.empty(config.width))
        self.mlp_scale = nn.Parameter(torch.empty(config.width))

    def forward(self, x, x0, matrices, value_embedding, cos, sin):
        query, key, value, output, up, down = matrices
        mix = self.residual_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attended = self.attention(
            norm(x) * self.depth_scale, query, key, value, output, value_embedding, cos, sin
        )
        x = x + self.attention_scale.to(x.dtype) * attended
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.depth_scale, up, down)


class BaselineGPT(nn.Module):
    """The whole model. Build it with `from_fairway`."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        width, head = config.width, config.head_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.bigram_embedding = nn.Embedding(config.bigram_buckets, config.bigram_width)
        self.bigram_projection = nn.Linear(config.bigram_width, width, bias=False)
        self.bigram_scale = nn.Parameter(torch.empty(()))
        self.smear_gate = nn.Parameter(torch.empty(width))
        self.value_embedding = nn.Embedding(config.vocab_size, config.value_width)
        self.value_projection = nn.Linear(config.value_width, config.kv_width, bias=False)
        self.value_scale = nn.Parameter(torch.empty(()))
        self.value_layer_scales = nn.Parameter(torch.empty(len(config.value_layers)))
        self.skip_weights = nn.Parameter(torch.empty(config.skips, width))
        self.query_output_bank = nn.Parameter(torch.empty(2 * config.layers, width, width))
        self.key_value_bank = nn.Parameter(torch.empty(2 * config.layers, config.kv_width, width))
        self.mlp_up_bank = nn.Parameter(torch.empty(config.layers, config.mlp_width, width))
        self.mlp_down_bank = nn.Parameter(torch.empty(config.layers, width, config.mlp_width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        cos, sin = rotary_tables(config, min(head, config.rotary_dimensions))
        self.register_buffer("cos", cos.to(compute_dtype), persistent=False)
        self.register_buffer("sin", sin.to(compute_dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] → logits float32 [B, T, V]."""
        x = self._embed(tokens)
        x0, skips = x, []
        values = self._value_embedding(tokens)
        encoders = self.config.layers // 2
        cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
        for layer, block in enumerate(self.blocks):
            if layer >= encoders and skips:
                x = x + self.skip_weights[layer - encoders].to(x.dtype) * skips.pop()
            x = block(x, x0, self._matrices(layer), self._layer_values(layer, values), cos, sin)
            if layer < encoders:
                skips.append(x)
        scores = F.linear(norm(x), self.token_embedding.weight.to(x.dtype)).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(scores / cap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of int64 targets [B, T]."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def _embed(self, tokens: Tensor) -> Tensor:
        previous = F.pad(tokens[:, :-1], (1, 0), value=-1)
        buckets = bigram_bucket(tokens, previous, self.config.bigram_buckets)
        bigram = self.bigram_projection(self.bigram_embedding(buckets))
        x = norm((self.token_embedding(tokens) + self.bigram_scale * bigram).to(self.compute_dtype))
        gate = torch.sigmoid(self.smear_gate).to(x.dtype)
        return (1 - gate) * x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))

    def _value_embedding(self, tokens: Tensor) -> Tensor:
        values = self.value_projection(self.value_embedding(tokens))
        return (self.value_scale * values).to(self.compute_dtype)

    def _layer_values(self, layer: int, values: Tensor) -> Tensor | None:
        if layer not in self.config.value_layers:
            return None
        index = self.config.value_layers.index(layer)
        return self.value_layer_scales[index].to(values.dtype) * values

    def _matrices(self, layer: int) -> tuple[Tensor, ...]:
        second = self.config.layers + layer
        matrices = (
            self.query_output_bank[layer],
            self.key_value_bank[layer],
            self.key_value_bank[second],
            self.query_output_bank[second],
            self.mlp_up_bank[layer],
            self.mlp_down_bank[layer],
        )
        return tuple(matrix.to(self.compute_dtype) for matrix in matrices)


def rotary_tables(config: GPTConfig, dimensions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, dimensions/2] for the training length, float32."""
    exponents = torch.arange(0, dimensions, 2) / dimensions
    positions = torch.arange(config.sequence_tokens, dtype=torch.float32)
    angles = torch.outer(positions, rotary_base(config) ** -exponents)
    return angles.cos(), angles.sin()


CHOSEN = {"layers", "width", "heads", "kv_heads", "mlp_width", "rotary_dimensions", "rope_base",
          "rope_trained_tokens", "bigram_buckets", "bigram_width", "value_width", "value_layers",
          "logit_softcap", "query_gain", "vocab_size", "sequence_tokens", "bos_id"}  # fmt: skip
"""Of a model's keys: the baseline takes any sizes, and features at their defaults."""


def is_submission(config: GPTConfig) -> bool:
    """Whether the model is the submission's, up to its sizes, so that the baseline can be it."""
    features = {name: field for name, field in GPTConfig.model_fields.items() if name not in CHOSEN}
    as_there = all(getattr(config, name) == field.default for name, field in features.items())
    return as_there and config.bigram_buckets > 0 and len(config.value_layers) > 0


def from_fairway(model: GPT) -> BaselineGPT:
    """The baseline with a Fairway model's weights (copied), device and compute dtype."""
    if not is_submission(model.config):
        raise UserError(
            "the baseline is the reference submission's model, and this config's has other parts: "
            "the stages train and sliding run without a baseline"
        )
    device = model.token_embedding.device
    baseline = BaselineGPT(model.config, model.compute_dtype)
    own = baseline.state_dict()
    state = {}
    for name, value in model.state_dict().items():
        if name in own:
            state[name] = value
        elif f"{name}.weight" in own:
            state[f"{name}.weight"] = value
        else:
            path = "attention.query_gain" if name == "query_gain" else name
            state |= {f"blocks.{layer}.{path}": row for layer, row in enumerate(value)}
    baseline.load_state_dict(state)
    return baseline.to(device)


def bank_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The banks' gradients by name, of either model."""
    return {name: getattr(model, name).grad for name in BANKS}
