"""MPT (model_type "mpt"): MosaicML, github.com/mosaicml/llm-foundry, 2023.

    x ── norm ── attention ── + ── norm ── MLP ── + ──>      (each + adds the branch's input; no biases anywhere)

B batch, T new tokens, K keys, H heads, D head dimension, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from streamllm.models.alibi import Alibi, position_bias
from streamllm.models.attention import attend
from streamllm.models.base import ACTIVATIONS, CausalLM
from streamllm.models.linear import Linear
from streamllm.models.step import Geometry, KVStore, Plan, Step


@dataclass(frozen=True)
class Config:
    """The numbers that the computation depends on. weights/mpt.py reads them from config.json."""

    vocab_size: int  # V
    width: int  # C
    mlp_width: int
    layers: int
    heads: int  # H
    head_dim: int  # D
    alibi: Alibi
    trained_length: int
    norm_eps: float
    activation: str
    clip_qkv: float | None  # queries, keys and values are clamped to ± this
    softmax_scale: float
    tied: bool  # the head is the embedding


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C, H, D = config.width, config.heads, config.head_dim
        self.head_dim, self.clip, self.scale = D, config.clip_qkv, config.softmax_scale
        self.q = Linear(C, H * D, bias=False)
        self.k = Linear(C, H * D, bias=False)
        self.v = Linear(C, H * D, bias=False)
        self.o = Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, step: Step, bias: Tensor, store: KVStore) -> Tensor:
        q, k, v = (project(x) for project in (self.q, self.k, self.v))
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v)
        )  # [B, H, T, D]
        keys, values = store.append(k, v)  # [B, H, K, D]
        read = attend(q, None, keys, values, step, self.scale, bias)
        return self.o(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_width, bias=False)
        self.down = Linear(config.mlp_width, config.width, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: Step, bias: Tensor, store: KVStore) -> Tensor:
        x = x + self.attention(self.attention_norm(x), step, bias, store)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Model(CausalLM):
    def __init__(self, config: Config) -> None:
        blocks = (Block(config) for _ in range(config.layers))
        super().__init__(config, blocks, nn.LayerNorm(config.width, config.norm_eps, bias=False))
        c = config
        self.geometry = Geometry(
            c.heads, c.head_dim, c.vocab_size, (None,) * c.layers, c.trained_length, rope=None
        )

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], the input of the head."""
        x = self.embed(tokens)
        step = plan.steps[None]
        bias = position_bias(self.config.alibi, step, x.dtype)
        for layer, store in zip(self.layers, plan.stores, strict=True):
            x = layer(x, step, bias, store)
        return self.norm(x)  # type: ignore[no-any-return]
