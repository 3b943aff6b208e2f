"""Falcon (model_type "falcon"): Almazrouei et al., arXiv 2311.16867; and its elders, arXiv 2306.01116.

    x ─┬─ norm ── attention ──┬─ + ──>      parallel, norms of their own (40B, 180B)
       ├─ norm ── MLP ────────┤
       └──────────────────────┘

    x ─┬─ norm ─┬─ attention ─┬─ + ──>      parallel, one norm for both (7B, 11B)
       │        └─ MLP ───────┤
       └──────────────────────┘

    x ── norm ── attention ── + ── norm ── MLP ── + ──>      sequential (RW; each + adds what went in)

B batch, T new tokens, K keys, H query heads, G key/value heads, D head dimension, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from streamllm.models.alibi import Alibi, position_bias
from streamllm.models.attention import attend
from streamllm.models.base import ACTIVATIONS, CausalLM
from streamllm.models.linear import Linear
from streamllm.models.rotary import Rope, Rotation, rotation
from streamllm.models.step import Geometry, KVStore, Plan, Step


@dataclass(frozen=True)
class Config:
    """The numbers that the computation depends on. weights/falcon.py reads them from config.json."""

    vocab_size: int  # V
    width: int  # C
    mlp_width: int
    layers: int
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # D
    position: Rope | Alibi
    trained_length: int | None  # tokens, stretched by the rope where it says so; None: ALiBi sets no end
    norm_eps: float
    activation: str
    bias: bool
    parallel: bool  # attention and MLP both read the block's input
    shared_norm: bool  # through the same norm
    tied: bool  # the head is the embedding


class RoundedLinear(Linear):
    """Rounds to the model's type before it adds the bias, too: so these models were trained."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.kernel(x, self.weight, None)
        return product if self.bias is None else product + self.bias


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C, H, G, D, bias = config.width, config.heads, config.kv_heads, config.head_dim, config.bias
        self.head_dim = D
        self.q = RoundedLinear(C, H * D, bias=bias)
        self.k = RoundedLinear(C, G * D, bias=bias)
        self.v = RoundedLinear(C, G * D, bias=bias)
        self.o = RoundedLinear(H * D, C, bias=bias)

    def forward(self, x: Tensor, step: Step, position: Rotation | Tensor, store: KVStore) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H or G, T, D]
            for project in (self.q, self.k, self.v)
        )
        scale = self.head_dim**-0.5
        if isinstance(position, Rotation):
            query, sink_query = position.queries(q)
            keys, values = store.append(position.keys(k), v)  # [B, G, K, D]
            read = attend(query, sink_query, keys, values, step, scale)
        else:
            keys, values = store.append(k, v)
            read = attend(q, None, keys, values, step, scale, bias=position)
        return self.o(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = RoundedLinear(config.width, config.mlp_width, bias=config.bias)
        self.down = RoundedLinear(config.mlp_width, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        if not config.shared_norm:
            self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.parallel, self.shared_norm = config.parallel, config.shared_norm

    def forward(self, x: Tensor, step: Step, position: Rotation | Tensor, store: KVStore) -> Tensor:
        normed = self.attention_norm(x)
        read = self.attention(normed, step, position, store)
        if self.parallel:
            return x + (self.mlp(normed if self.shared_norm else self.mlp_norm(x)) + read)  # type: ignore[no-any-return]
        x = x + read
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Model(CausalLM):
    def __init__(self, config: Config) -> None:
        blocks = (Block(config) for _ in range(config.layers))
        super().__init__(config, blocks, nn.LayerNorm(config.width, config.norm_eps))
        c = config
        rope = c.position if isinstance(c.position, Rope) else None
        self.geometry = Geometry(
            c.kv_heads, c.head_dim, c.vocab_size, (None,) * c.layers, c.trained_length, rope
        )

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], the input of the head."""
        x = self.embed(tokens)
        step = plan.steps[None]
        encoding = self.config.position
        if isinstance(encoding, Rope):
            position: Rotation | Tensor = rotation(encoding, step, x.dtype)
        else:  # added to the scores before they are scaled, so scaled with them
            position = position_bias(encoding, step, x.dtype, scale=self.config.head_dim**-0.5)
        for layer, store in zip(self.layers, plan.stores, strict=True):
            x = layer(x, step, position, store)
        return self.norm(x)  # type: ignore[no-any-return]
