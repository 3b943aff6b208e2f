"""Each family's layers for one token in NumPy, for the reference implementation of streaming."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from streamllm.models import falcon, gpt_neox, llama, mpt
from streamllm.models.alibi import Alibi
from tests.laws import reference
from tests.laws.reference import Array


class Llama(reference.Llama):
    """Also Mistral and Qwen: sliding windows of layers, and norms of query and key heads."""

    def __init__(self, model: llama.Model) -> None:
        super().__init__(model)
        if self.config.windows:
            self.windows = list(self.config.windows)

    def project(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(layer, x)
        if self.config.head_norms:
            q = np.stack([self.norm(f"layers.{layer}.attention.q_norm", head) for head in q])
            k = np.stack([self.norm(f"layers.{layer}.attention.k_norm", head) for head in k])
        return q, k, v


class WithLayerNorm(reference.Llama):
    """The base of the other families: LayerNorm instead of RMSNorm, and an MLP without a gate."""

    def mlp(self, layer: int, x: Array) -> Array:
        assert self.config.activation == "gelu"
        x = self.linear(f"layers.{layer}.mlp.up", x)
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return self.linear(f"layers.{layer}.mlp.down", x)

    def norm(self, name: str, x: Array) -> Array:
        x = x - x.mean()
        x = x / np.sqrt((x * x).mean() + self.config.norm_eps) * self.weights[f"{name}.weight"]
        return x + self.weights.get(f"{name}.bias", 0.0)


class GPTNeoX(WithLayerNorm):
    def join(self, layer: int, x: Array, heads: Array) -> Array:
        after = x + self.linear(f"layers.{layer}.attention.o", heads.reshape(-1))
        mlp_input = x if self.config.parallel else after
        return after + self.mlp(layer, self.norm(f"layers.{layer}.mlp_norm", mlp_input))


class Falcon(WithLayerNorm):
    def encoding(self, rope_length: int) -> reference.Encoding:
        position = self.config.position
        if not isinstance(position, Alibi):
            return reference.Rotary(position.frequencies(rope_length), position.attention_factor)
        return reference.Alibi(position.slopes().double() * self.scale)  # the bias is scaled with the scores

    def join(self, layer: int, x: Array, heads: Array) -> Array:
        after = x + self.linear(f"layers.{layer}.attention.o", heads.reshape(-1))
        norm = "attention_norm" if self.config.shared_norm else "mlp_norm"
        mlp_input = x if self.config.parallel else after
        return after + self.mlp(layer, self.norm(f"layers.{layer}.{norm}", mlp_input))


class MPT(WithLayerNorm):
    def __init__(self, model: mpt.Model) -> None:
        super().__init__(model)
        self.scale = self.config.softmax_scale

    def encoding(self, rope_length: int) -> reference.Alibi:
        return reference.Alibi(self.config.alibi.slopes())

    def project(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        clip = self.config.clip_qkv or np.inf
        q, k, v = (np.clip(part, -clip, clip) for part in super().project(layer, x))
        return q, k, v

    def join(self, layer: int, x: Array, heads: Array) -> Array:
        x = x + self.linear(f"layers.{layer}.attention.o", heads.reshape(-1))
        return x + self.mlp(layer, self.norm(f"layers.{layer}.mlp_norm", x))


NETWORKS = {llama.Model: Llama, gpt_neox.Model: GPTNeoX, falcon.Model: Falcon, mpt.Model: MPT}


def network(model: nn.Module) -> reference.Network:
    return NETWORKS[type(model)](model)
