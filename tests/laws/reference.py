"""The definition of streaming, spelled out: token by token, evicting one by one, a key's rank as its place.

Slow and plain on purpose, in float64 and NumPy. From the library it takes weights, sizes and the constants of
float32 values (frequencies, slopes); it shares no arithmetic with it. `Network` is what a family has to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


class Encoding(Protocol):
    """How a place acts on attention: by turning queries and keys, or by a bias on the scores."""

    def turn(self, x: Array, place: int) -> Array:
        """Heads [heads, D] as they look at a place."""
        ...

    def turn_back(self, x: Array, place: int) -> Array:
        """The inverse of `turn`."""
        ...

    def bias(self, distance: int) -> Array:
        """What is added to the scores of the heads ([H], or [1] for all alike), for a key that far back."""
        ...


class Rotary:
    """Dimension i turns with dimension i + n, by place · frequencies[i], for the n frequencies."""

    def __init__(self, frequencies: torch.Tensor, factor: float = 1.0) -> None:
        assert frequencies.dtype == torch.float32
        self.frequencies = frequencies.double().numpy()
        self.factor = factor

    def turn(self, x: Array, place: int) -> Array:
        return self._turn(x, self.factor, place)

    def turn_back(self, x: Array, place: int) -> Array:
        return self._turn(x, 1 / self.factor, -place)

    def _turn(self, x: Array, factor: float, place: int) -> Array:
        n = len(self.frequencies)
        pairs = x[:, :n] + 1j * x[:, n : 2 * n]
        turned = factor * np.exp(1j * place * self.frequencies) * pairs
        return np.concatenate((turned.real, turned.imag, x[:, 2 * n :]), axis=1)

    def bias(self, distance: int) -> Array:
        return np.zeros(1)


class Alibi:
    """A slope per head: the further the key, the lower its score."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.slopes = slopes.double().numpy()

    def turn(self, x: Array, place: int) -> Array:
        return x

    def turn_back(self, x: Array, place: int) -> Array:
        return x

    def bias(self, distance: int) -> Array:
        return -self.slopes * distance


class Network(Protocol):
    """A family, for one token x [C]. `windows` are the model's own, one per layer."""

    windows: Sequence[int | None]
    scale: float

    def encoding(self, span: int) -> Encoding: ...
    def embed(self, token: int) -> Array: ...
    def project(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        """Queries [H, D], keys [G, D] and values [G, D], before any rotation."""
        ...

    def join(self, layer: int, x: Array, read: Array) -> Array:
        """The rest of a block, after its heads have read [H, D]."""
        ...

    def logits(self, x: Array) -> Array: ...


class Cached(NamedTuple):
    token: int  # its index in the stream, to look at while debugging: nothing depends on it
    key: Array  # [G, D], not rotated
    value: Array  # [G, D]


def in_int8(x: Array) -> Array:
    """Each row [D] as whole numbers in -127 … 127 times a scale, which the largest of them decides."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.rint(x / scale) * scale


class Stream:
    """A stream with sinks and a window, from its first token on.

    `int8`: recent keys and values are rounded when they come, keys as they stand at their place in the text.
    """

    def __init__(self, network: Network, sinks: int, window: int, int8: bool = False) -> None:
        self.network, self.sinks, self.int8 = network, sinks, int8
        self.windows = [window if own is None else min(window, own) for own in network.windows]
        self.encodings = [network.encoding(sinks + window)] * len(self.windows)
        self.cached: list[list[Cached]] = [[] for _ in self.windows]
        self.seen = 0

    def step(self, token: int) -> Array:
        """The logits [V] after the next token."""
        x = self.network.embed(token)
        for layer, cached in enumerate(self.cached):
            queries, keys, values = self.network.project(layer, x)
            if self.int8 and self.seen >= self.sinks:
                encoding, place = self.encodings[layer], self.seen
                keys = encoding.turn_back(in_int8(encoding.turn(keys, place)), place)
                values = in_int8(values)
            cached.append(Cached(self.seen, keys, values))
            if len(cached) > self.sinks + self.windows[layer]:
                del cached[self.sinks]
            read = self.attend(queries, cached, self.encodings[layer])
            x = self.network.join(layer, x, read)
        self.seen += 1
        return self.network.logits(x)

    def attend(self, queries: Array, cached: Sequence[Cached], encoding: Encoding) -> Array:
        """The query stands at the last rank. [H, D] in and out."""
        last = len(cached) - 1
        owner = np.arange(len(queries)) * len(cached[0].key) // len(queries)  # neighbours share a key head
        keys = np.stack([encoding.turn(entry.key, rank) for rank, entry in enumerate(cached)])[:, owner]
        values = np.stack([entry.value for entry in cached])[:, owner]  # [n, H, D]
        bias = np.stack([encoding.bias(last - rank) for rank in range(len(cached))])  # [n, H]
        scores = (encoding.turn(queries, last) * keys).sum(2) * self.network.scale + bias
        weights = np.exp(scores - scores.max(0))
        weights /= weights.sum(0)
        return (weights[:, :, None] * values).sum(0)


def run(network: Network, tokens: Sequence[int], sinks: int, window: int, int8: bool = False) -> torch.Tensor:
    """The logits [T, V] of a whole stream."""
    stream = Stream(network, sinks, window, int8)
    return torch.from_numpy(np.stack([stream.step(token) for token in tokens]))


class Llama:
    """The weights of a `streamllm.models.llama.Model`, read by name."""

    def __init__(self, model: nn.Module) -> None:
        self.config = c = model.config
        self.weights = {name: w.detach().double().numpy() for name, w in model.state_dict().items()}
        self.windows = [None] * c.layers
        self.scale = 1 / math.sqrt(c.head_dim)

    def encoding(self, span: int) -> Rotary:
        return Rotary(self.config.rope.frequencies(span), self.config.rope.attention_factor)

    def embed(self, token: int) -> Array:
        return self.weights["embed.weight"][token]

    def project(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        x = self.norm(f"layers.{layer}.attention_norm", x)
        q, k, v = (self.linear(f"layers.{layer}.attention.{name}", x) for name in "qkv")
        D = self.config.head_dim
        return q.reshape(-1, D), k.reshape(-1, D), v.reshape(-1, D)

    def join(self, layer: int, x: Array, read: Array) -> Array:
        x = x + self.linear(f"layers.{layer}.attention.o", read.reshape(-1))
        normed = self.norm(f"layers.{layer}.mlp_norm", x)
        gate = self.linear(f"layers.{layer}.mlp.gate", normed)
        up = self.linear(f"layers.{layer}.mlp.up", normed)
        assert self.config.activation == "silu"
        return x + self.linear(f"layers.{layer}.mlp.down", gate / (1 + np.exp(-gate)) * up)

    def logits(self, x: Array) -> Array:
        return self.linear("head", self.norm("norm", x))

    def norm(self, name: str, x: Array) -> Array:
        return x / np.sqrt((x * x).mean() + self.config.norm_eps) * self.weights[f"{name}.weight"]

    def linear(self, name: str, x: Array) -> Array:
        y = self.weights[f"{name}.weight"] @ x
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias
