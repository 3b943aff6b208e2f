"""The definition of streaming as a reference implementation: one token at a time, with a list of cached keys.

Positions are positions inside the cache. The code is slow and simple on purpose, in float64 and NumPy. From the
library it takes only weights, sizes and the constants with float32 values (rotary frequencies, ALiBi slopes). It
shares no arithmetic with the library.
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
    """A position encoding: a rotation of queries and keys, or a bias on the scores."""

    def rotate(self, x: Array, place: int) -> Array:
        """Heads [heads, D], rotated for a place."""
        ...

    def rotate_back(self, x: Array, place: int) -> Array:
        """The inverse of `rotate`."""
        ...

    def bias(self, distance: int) -> Array:
        """The bias on the scores of a key `distance` tokens before the query: [H], or [1] for all heads."""
        ...


class Rotary:
    """Rotates dimensions i and i + n by place · frequencies[i], for the n frequencies. The rest stays."""

    def __init__(self, frequencies: torch.Tensor, factor: float = 1.0) -> None:
        assert frequencies.dtype == torch.float32
        self.frequencies = frequencies.double().numpy()
        self.factor = factor

    def rotate(self, x: Array, place: int) -> Array:
        return self._rotate(x, self.factor, place)

    def rotate_back(self, x: Array, place: int) -> Array:
        return self._rotate(x, 1 / self.factor, -place)

    def _rotate(self, x: Array, factor: float, place: int) -> Array:
        n = len(self.frequencies)
        pairs = x[:, :n] + 1j * x[:, n : 2 * n]
        rotated = factor * np.exp(1j * place * self.frequencies) * pairs
        return np.concatenate((rotated.real, rotated.imag, x[:, 2 * n :]), axis=1)

    def bias(self, distance: int) -> Array:
        return np.zeros(1)


class Alibi:
    """Subtracts slope · distance from the scores of each head."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.slopes = slopes.double().numpy()

    def rotate(self, x: Array, place: int) -> Array:
        return x

    def rotate_back(self, x: Array, place: int) -> Array:
        return x

    def bias(self, distance: int) -> Array:
        return -self.slopes * distance


class Network(Protocol):
    """A model, for one token x [C].

    Attributes:
        windows: the sliding window of each layer, None where it has none.
        scale: of the scores.
    """

    windows: Sequence[int | None]
    scale: float

    def encoding(self, rope_length: int) -> Encoding: ...
    def embed(self, token: int) -> Array: ...
    def project(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        """Queries [H, D], keys [G, D] and values [G, D], before any rotation."""
        ...

    def join(self, layer: int, x: Array, heads: Array) -> Array:
        """The rest of a block: x is its input, heads [H, D] is what attention returns."""
        ...

    def logits(self, x: Array) -> Array: ...


class Cached(NamedTuple):
    token: int  # its index in the stream, for debugging only
    key: Array  # [G, D], not rotated
    value: Array  # [G, D]


def rounded_to_int8(x: Array) -> Array:
    """Each row [D] rounded to whole numbers in -127 … 127 times a scale, and multiplied by it again."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.rint(x / scale) * scale


class Stream:
    """A stream with sinks and a window.

    `int8`: recent keys and values are rounded when they are appended, the keys in their rotation for their place in
    the text.
    """

    def __init__(self, network: Network, sinks: int, window: int, int8: bool = False) -> None:
        self.network, self.sinks, self.int8 = network, sinks, int8
        self.windows = [window if sliding is None else min(window, sliding) for sliding in network.windows]
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
                keys = encoding.rotate_back(rounded_to_int8(encoding.rotate(keys, place)), place)
                values = rounded_to_int8(values)
            cached.append(Cached(self.seen, keys, values))
            if len(cached) > self.sinks + self.windows[layer]:
                del cached[self.sinks]
            heads = self.attend(queries, cached, self.encodings[layer])
            x = self.network.join(layer, x, heads)
        self.seen += 1
        return self.network.logits(x)

    def attend(self, queries: Array, cached: Sequence[Cached], encoding: Encoding) -> Array:
        """The heads [H, D] of the newest token, which is the last one in `cached`. Its place is its index there."""
        last = len(cached) - 1
        key_head = np.arange(len(queries)) * len(cached[0].key) // len(queries)  # of each query head
        keys = np.stack([encoding.rotate(entry.key, place) for place, entry in enumerate(cached)])[
            :, key_head
        ]
        values = np.stack([entry.value for entry in cached])[:, key_head]  # [n, H, D]
        bias = np.stack([encoding.bias(last - place) for place in range(len(cached))])  # [n, H]
        scores = (encoding.rotate(queries, last) * keys).sum(2) * self.network.scale + bias
        weights = np.exp(scores - scores.max(0))
        weights /= weights.sum(0)
        return (weights[:, :, None] * values).sum(0)


def run(network: Network, tokens: Sequence[int], sinks: int, window: int, int8: bool = False) -> torch.Tensor:
    """The logits [T, V] of a whole stream."""
    stream = Stream(network, sinks, window, int8)
    return torch.from_numpy(np.stack([stream.step(token) for token in tokens]))


class Llama:
    """A `streamllm.models.llama.Model`, computed from its weights."""

    def __init__(self, model: nn.Module) -> None:
        self.config = c = model.config
        self.weights = {name: w.detach().double().numpy() for name, w in model.state_dict().items()}
        self.windows = [None] * c.layers
        self.scale = 1 / math.sqrt(c.head_dim)

    def encoding(self, rope_length: int) -> Rotary:
        return Rotary(self.config.rope.frequencies(rope_length), self.config.rope.attention_factor)

    def embed(self, token: int) -> Array:
        return self.weights["embed.weight"][token]

    def project(self, layer: int, x: Array) -> tuple[Array, Array, Array]:
        x = self.norm(f"layers.{layer}.attention_norm", x)
        q, k, v = (self.linear(f"layers.{layer}.attention.{name}", x) for name in "qkv")
        D = self.config.head_dim
        return q.reshape(-1, D), k.reshape(-1, D), v.reshape(-1, D)

    def join(self, layer: int, x: Array, heads: Array) -> Array:
        x = x + self.linear(f"layers.{layer}.attention.o", heads.reshape(-1))
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
