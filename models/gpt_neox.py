"""GPT-NeoX (model_type "gpt_neox"): Black et al., arXiv 2204.06745; Pythia, arXiv 2304.01373.

    x ─┬─ norm ── attention ──┬─ + ──>      parallel residual: both norms read x, and x is added to the sum
       ├─ norm ── MLP ────────┤
       └──────────────────────┘

    x ── norm ── attention ── + ── norm ── MLP ── + ──>      sequential (each + adds the branch's input)

B batch, T new tokens, K keys, H heads, D head dimension, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from streamllm.models.attention import attend
from streamllm.models.base import ACTIVATIONS, CausalLM
from streamllm.models.linear import Linear
from streamllm.models.rotary import Rope, Rotation, rotation
from streamllm.models.step import Geometry, KVStore, Plan, Step


@dataclass(frozen=True)
class Config:
    """The numbers that the computation depends on. weights/gpt_neox.py reads them from config.json."""

    vocab_size: int  # V
    width: int  # C
    mlp_width: int
    layers: int
    heads: int  # H
    head_dim: int  # D
    rope: Rope  # of a part of each head, in most
    trained_length: int  # tokens, stretched by the rope where it says so
    norm_eps: float
    activation: str
    attention_bias: bool
    parallel: bool  # attention and MLP both read the block's input
    tied: bool  # the head is the embedding


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C, H, D, bias = config.width, config.heads, config.head_dim, config.attention_bias
        self.head_dim = D
        self.q = Linear(C, H * D, bias=bias)
        self.k = Linear(C, H * D, bias=bias)
        self.v = Linear(C, H * D, bias=bias)
        self.o = Linear(H * D, C, bias=bias)

    def forward(self, x: Tensor, step: Step, rotation: Rotation, store: KVStore) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
            for project in (self.q, self.k, self.v)
        )
        query, sink_query = rotation.queries(q)
        keys, values = store.append(rotation.keys(k), v)  # [B, H, K, D]
        read = attend(query, sink_query, keys, values, step, scale=self.head_dim**-0.5)
        return self.o(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_width)
        self.down = Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.parallel = config.parallel

    def forward(self, x: Tensor, step: Step, rotation: Rotation, store: KVStore) -> Tensor:
        read = self.attention(self.attention_norm(x), step, rotation, store)
        if self.parallel:
            return self.mlp(self.mlp_norm(x)) + read + x  # type: ignore[no-any-return]
        x = x + read
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Model(CausalLM):
    def __init__(self, config: Config) -> None:
        blocks = (Block(config) for _ in range(config.layers))
        super().__init__(config, blocks, nn.LayerNorm(config.width, config.norm_eps))
        c = config
        self.geometry = Geometry(
            c.heads, c.head_dim, c.vocab_size, (None,) * c.layers, c.trained_length, c.rope
        )

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], the input of the head."""
        x = self.embed(tokens)
        step = plan.steps[None]
        turned = rotation(self.config.rope, step, x.dtype)
        for layer, store in zip(self.layers, plan.stores, strict=True):
            x = layer(x, step, turned, store)
        return self.norm(x)  # type: ignore[no-any-return]
