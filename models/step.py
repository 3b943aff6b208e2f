"""Step: where the tokens of one forward stand. Made once per forward, shared by all layers.

The axes, here and in every model:  R rows of places (1 where all rows of the batch stand at the same place, else
B), T new tokens, K keys that the queries meet, S sinks, W window. A *place* is an index in the stream, a *slot*
an index in memory. t counts the tokens of a row from 0, whatever the origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from streamllm.models.rotary import Rope


def is_visible(key: Tensor, query: Tensor, sinks: int, window: int) -> Tensor:
    """Whether the query token sees the key token: bool, broadcast. Both count from 0; a key below 0 is empty."""
    return (key >= 0) & (key <= query) & ((key < sinks) | (key > query - window))


@dataclass(frozen=True)
class Band:
    """Visibility in five numbers, for rows in lockstep whose keys lie in text order.

    The K keys are the sinks 0 … `columns` - 1, then a run of consecutive tokens. Adjacent queries see one
    contiguous range of the run. All numbers count from 0, whatever the origin.
    """

    start: int  # t of the first query
    first: int  # t of the first key of the run
    columns: int  # the sinks among the keys, in front of the run
    sinks: int  # S: tokens of the run below S are hidden, because they stand among the columns
    window: int  # W

    def run(self, start: int, stop: int) -> tuple[int, int]:
        """The range of the K keys that holds every key of the run seen by the queries `start` … `stop` - 1."""
        high = self.start + stop - self.first
        low = max(self.sinks, self.start + start - self.window + 1, self.first) - self.first
        return self.columns + min(low, high), self.columns + high

    def sink_mask(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        """bool [stop - start, columns]: which sinks each query sees; None where each sees all."""
        if self.columns <= self.start + start + 1:
            return None
        query = torch.arange(self.start + start, self.start + stop, dtype=torch.int64, device=device)[:, None]
        return torch.arange(self.columns, dtype=torch.int64, device=device) <= query


@dataclass(frozen=True, eq=False)
class Step:
    """The places of T new tokens and of the K keys that they meet: the same for all layers with one window.

    A query stands at two places. Recent keys see it at ``query_place``, its place in the text. Sinks see it at
    ``sink_query_place``, which stops at S + W - 1 once the window is full: the sinks travel with the window. Where
    `gap` places behind the sinks are empty, because entries were taken out, the sinks have moved up by the gap.

    Example: S = 2 sinks, W = 3, the single token t = 9. Its key takes slot 2 + (9 - 2) % 3 = 3, where token 6
    was. The slots then hold the tokens 0 1 8 9 7. Token 9 sees all of them, so ``visible`` is None. Its
    ``query_place`` is 9 and its ``sink_query_place`` is S + W - 1 = 4: sink 0 is at distance 4, sink 1 at
    3, token 7 at 2, token 8 at 1, token 9 at 0, as if the tokens 2 … 6 had never been there.
    """

    slots: Tensor  # int64 [R, T] slot that each new token takes
    query_place: Tensor  # int64 [R, T] place of each query for recent keys: origin + t
    sink_query_place: Tensor  # int64 [R, T] place of each query for sinks: min(t - gap, S + W - 1)
    new_key_place: (
        Tensor  # int64 [R, T] place where each new key is rotated, once: t for a sink, else origin + t
    )
    key_place: Tensor  # int64 [R, K] place of each key that is met
    visible: Tensor | None  # bool [R, T, K]; None where every query sees every key, or where `band` tells
    sinks: int  # the first `sinks` of the K keys meet the sink query; 0: no key needs a query of its own
    rope_length: int  # S + W with a cache, T without: the length that the frequencies of some ropes depend on
    band: Band | None = None  # visibility in numbers, where they can tell it

    @property
    def is_causal(self) -> bool:
        """Whether this is the plain lower triangle: T queries and their own T keys, no window."""
        band, length = self.band, self.query_place.shape[1]
        return band is not None and not band.columns and band.first == band.start and band.window >= length

    def mask(self) -> Tensor | None:
        """bool [R, T, K]: which keys each query sees; None where it sees all."""
        if self.band is None:
            return self.visible
        band, length, device = self.band, self.query_place.shape[1], self.query_place.device
        query = torch.arange(band.start, band.start + length, dtype=torch.int64, device=device)[:, None]
        run = torch.arange(
            band.first, band.first + self.key_place.shape[1] - band.columns, dtype=torch.int64, device=device
        )
        sinks = torch.arange(band.columns, dtype=torch.int64, device=device)
        run = torch.where(run < band.sinks, -1, run)
        return is_visible(torch.cat((sinks, run)), query, band.columns, band.window)[None]

    def distance(self) -> Tensor:
        """How far each key is from each query, in tokens: int64 [R, T, K]. Meaningless where not visible."""
        distance = self.query_place[:, :, None] - self.key_place[:, None, :]
        if self.sinks:
            sinks = self.sink_query_place[:, :, None] - self.key_place[:, None, : self.sinks]
            distance[:, :, : self.sinks] = sinks
        return distance

    @staticmethod
    def dense(length: int, window: int | None = None, device: torch.device | str = "cpu") -> Step:
        """A text from its start, without a cache: places 0 … T-1, causal, at most `window` keys back."""
        places = torch.arange(length, dtype=torch.int64, device=device)[None]
        return Step(
            slots=places,
            query_place=places,
            sink_query_place=places,
            new_key_place=places,
            key_place=places,
            visible=None,
            sinks=0,
            rope_length=length,
            band=Band(0, 0, 0, 0, length if window is None else window) if length > 1 else None,
        )


class KVStore(Protocol):
    """What one layer keeps of its keys and values between forwards."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the new keys and values [B, G, T, D]; return all that the T queries meet, [B, G, K, D]."""
        ...


class NoCache:
    """The store of a forward without a cache: the queries meet the keys that came with them."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward: a Step for each distinct window of the model's layers, and a store for each layer."""

    steps: Mapping[int | None, Step]  # by the layer's own sliding window; None: it has none
    stores: Sequence[KVStore]  # one per layer


class Cache(Protocol):
    """What a forward needs of a cache. It plans a chunk, the model computes it, the cache commits it."""

    @property
    def chunk(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    def plan(self, length: int, lengths: Sequence[int] | None = None) -> Plan: ...
    def commit(self, plan: Plan) -> None: ...
    @property
    def guard(self) -> AbstractContextManager[None]: ...  # held by one forward at a time
    def check_model(
        self, geometry: Geometry, device: torch.device
    ) -> None: ...  # raises ValueError for another


@dataclass(frozen=True)
class Geometry:
    """What a cache and a generate loop need to know of a model, whatever its family."""

    kv_heads: int  # G
    head_dim: int  # D
    vocab_size: int  # V
    windows: tuple[int | None, ...]  # each layer's own sliding window
    trained_length: (
        int | None
    )  # positions that the model was trained for; None: its encoding has no limit (ALiBi)
    rope: Rope | None  # rotates the keys; None: the model's keys are not rotated (ALiBi)

    def dense_plan(self, length: int, device: torch.device | str = "cpu") -> Plan:
        """The plan of a whole text without a cache."""
        steps = {window: Step.dense(length, window, device) for window in set(self.windows)}
        return Plan(steps, [NoCache()] * len(self.windows))


def geometry_of(model: nn.Module) -> Geometry:
    """The geometry of a model of this library. Raises TypeError for any other model."""
    geometry = getattr(model, "geometry", None)
    if not isinstance(geometry, Geometry):
        raise TypeError(
            f"{type(model).__module__}.{type(model).__name__} is not a model of this library; "
            f"load the checkpoint with streamllm.load"
        )
    return geometry
