"""MPT (model_type "mpt"): MosaicML, github.com/mosaicml/llm-foundry, 2023.

    x ── norm ── attention ── + ── norm ── MLP ── + ──>      (each + adds what went in; no biases anywhere)

B batch, T new tokens, K keys, H heads, D head dimension, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from streamllm.models.alibi import Alibi, position_bias
from streamllm.models.attention import attend
from streamllm.models.layers import ACTIVATIONS, Embedding, Linear
from streamllm.models.step import Cache, Geometry, KVStore, Plan, Step, forward_in_chunks


@dataclass(frozen=True)
class Config:
    """The numbers that act. Names and defaults on disk are `weights/mpt.py`'s affair."""

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
        read = attend(q, q, keys, values, step, self.scale, bias)
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


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps, bias=False)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def geometry(self) -> Geometry:
        c = self.config
        return Geometry(c.heads, c.head_dim, c.vocab_size, (None,) * c.layers, c.trained_length)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        *,
        lengths: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """int64 [B, T] -> logits [B, T, V]: a whole text, or with a cache the next T tokens of the streams.

        See `forward_in_chunks` for `lengths` [B], `logits_to_keep` and errors.
        """
        return forward_in_chunks(self, tokens, cache, lengths, logits_to_keep)

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], before the head."""
        x = self.embed(tokens)
        step = plan.steps[None]
        bias = position_bias(self.config.alibi, step, x.dtype)
        for layer, store in zip(self.layers, plan.stores, strict=True):
            x = layer(x, step, bias, store)
        return self.norm(x)  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        """[B, T, C] -> logits [B, T, V]."""
        return self.head(x)  # type: ignore[no-any-return]
