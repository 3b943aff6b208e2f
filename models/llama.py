"""Llama (model_type "llama"): Touvron et al., arXiv 2302.13971 and 2307.09288; Llama 3, arXiv 2407.21783; and
its kin "mistral" (arXiv 2310.06825), "qwen2" (arXiv 2407.10671), "qwen3" (arXiv 2505.09388).

    x ── norm ── attention ── + ── norm ── gated MLP ── + ──>      (each + adds the branch's input)

Mistral's layers see no further back than a window, those of Qwen may. Qwen2 has biases on q, k and v alone.
Qwen3 normalises each head's queries and keys before they are rotated.

B batch, T new tokens, K keys, H query heads, G key/value heads, D head dimension, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from streamllm.models.attention import attend
from streamllm.models.base import ACTIVATIONS, CausalLM, RMSNorm
from streamllm.models.linear import Linear
from streamllm.models.rotary import Rope, Rotation, rotation
from streamllm.models.step import Geometry, KVStore, Plan, Step


@dataclass(frozen=True)
class Config:
    """The numbers that the computation depends on. weights/llama.py reads them from config.json."""

    vocab_size: int  # V
    width: int  # C
    mlp_width: int
    layers: int
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # D, not always C / H
    rope: Rope
    trained_length: int  # tokens, stretched by the rope where it says so
    norm_eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding
    output_bias: bool = True  # of o, too, where attention_bias is: not in Qwen2
    head_norms: bool = False  # of queries and keys: Qwen3
    windows: tuple[int | None, ...] = ()  # how many tokens each layer sees; (): all see all


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C, H, G, D, bias = config.width, config.heads, config.kv_heads, config.head_dim, config.attention_bias
        self.head_dim = D
        self.q = Linear(C, H * D, bias=bias)
        self.k = Linear(C, G * D, bias=bias)
        self.v = Linear(C, G * D, bias=bias)
        self.o = Linear(H * D, C, bias=bias and config.output_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.head_norms else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.head_norms else nn.Identity()

    def forward(self, x: Tensor, step: Step, rotation: Rotation, store: KVStore) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H or G, T, D]
            for project in (self.q, self.k, self.v)
        )
        query, sink_query = rotation.queries(self.q_norm(q))
        keys, values = store.append(rotation.keys(self.k_norm(k)), v)  # [B, G, K, D]
        read = attend(query, sink_query, keys, values, step, scale=self.head_dim**-0.5)
        return self.o(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: Step, rotation: Rotation, store: KVStore) -> Tensor:
        x = x + self.attention(self.attention_norm(x), step, rotation, store)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Model(CausalLM):
    def __init__(self, config: Config) -> None:
        blocks = (Block(config) for _ in range(config.layers))
        super().__init__(config, blocks, RMSNorm(config.width, config.norm_eps))
        c = config
        self.geometry = Geometry(
            c.kv_heads, c.head_dim, c.vocab_size, c.windows or (None,) * c.layers, c.trained_length, c.rope
        )

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], the input of the head."""
        x = self.embed(tokens)
        rotations = {window: rotation(self.config.rope, step, x.dtype) for window, step in plan.steps.items()}
        of_each_layer = zip(self.layers, self.geometry.windows, plan.stores, strict=True)
        for layer, window, store in of_each_layer:
            x = layer(x, plan.steps[window], rotations[window], store)
        return self.norm(x)  # type: ignore[no-any-return]
