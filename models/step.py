"""Where the tokens of one forward stand: slots, places and visibility, made once and shared by all layers.

The axes, here and in every model:  R rows of places (1 where all rows of the batch stand at the same place,
else B), T new tokens, K keys that a query may meet, S sinks, W window. A *place* is an index in the stream,
a *slot* an index in memory. t counts a row's tokens from 0, whatever the origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Band:
    """Rows in lockstep, whose keys lie in the order of their places: the sinks, then a run without a gap.

    What a few neighbouring queries see is then a few neighbouring keys. Counted from 0, whatever the origin.
    """

    start: int  # t of the first query
    first: int  # t of the first key of the run
    columns: int  # keys before the run, which hold the sinks 0 … columns - 1
    sinks: int  # S: the run's keys before it are hidden, they stand among the columns
    window: int  # W

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """The keys of the run that some of the queries `start` … `stop` - 1 see, as a range of the K keys."""
        high = self.start + stop - self.first
        low = min(high, max(self.sinks, self.start + start - self.window + 1, self.first) - self.first)
        return self.columns + low, self.columns + high

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        """bool [stop - start, columns + the keys of the run that they see]; None where each sees all."""
        low, high = self.keys(start, stop)
        if stop - start == 1 and self.columns <= self.start + stop:
            return None
        query = torch.arange(self.start + start, self.start + stop, device=device)[:, None]
        run = torch.arange(low, high, device=device) + (self.first - self.columns)
        recent = (run <= query) & (run > query - self.window)
        return torch.cat((torch.arange(self.columns, device=device) <= query, recent), 1)


@dataclass(frozen=True, eq=False)
class Step:
    """The places of T new tokens and of the K keys that they meet, the same for every layer of one window.

    A query stands at two places. Recent keys see it at ``near``, its place in the text. Sinks see it at
    ``far``, which stops moving once the window is full: the sinks travel with the window.

    Example: S = 2 sinks, W = 3, token t = 9 alone. Its key takes slot 2 + (9 - 2) % 3 = 3, where token 6
    stood. The slots then hold the tokens 0 1 8 9 7, all of which it may see, so ``visible`` is None;
    ``near`` is 9 and ``far`` is S + W - 1 = 4: sink 0 is at distance 4, token 7 at distance 2, and the five
    keys stand 0, 1, 2, 3, 4 steps away, as if nothing had ever been evicted.
    """

    slots: Tensor  # [R, T] slot that each new token takes
    near: Tensor  # [R, T] place of each query, as recent keys see it: origin + t
    far: Tensor  # [R, T] place of each query, as sinks see it: min(t, S + W - 1)
    own: Tensor  # [R, T] place at which each new key is rotated, once: t for a sink, else origin + t
    keys: Tensor  # [R, K] place of each key
    visible: Tensor | None  # [R, T, K] bool; None where every query sees every key, and where `band` says it
    sinks: int  # the first `sinks` of the K keys are scored by the far query; 0 where near and far agree
    span: int  # S + W with a cache, T without: the length that some rotary frequencies depend on
    band: Band | None = None  # what is visible, where few numbers can say it
    causal: bool = False  # … and it is the lower triangle of a text from its start, known to kernels

    def mask(self) -> Tensor | None:
        """bool [R, T, K]: which keys each query sees; None where it sees all."""
        if self.band is None:
            return self.visible
        low, high = self.band.keys(0, self.near.shape[1])
        mask = self.band.mask(0, self.near.shape[1], self.near.device)
        if mask is None or (low == self.band.columns and high == self.keys.shape[1]):
            return None if mask is None else mask[None]
        hidden = mask.new_zeros(len(mask), low - self.band.columns)
        return torch.cat((mask[:, : self.band.columns], hidden, mask[:, self.band.columns :]), 1)[None]

    def distance(self) -> Tensor:
        """How far each key is from each query, in tokens: int64 [R, T, K]. Meaningless where not visible."""
        distance = self.near[:, :, None] - self.keys[:, None, :]
        if self.sinks:
            distance[:, :, : self.sinks] = self.far[:, :, None] - self.keys[:, None, : self.sinks]
        return distance

    @staticmethod
    def dense(length: int, window: int | None = None, device: torch.device | str = "cpu") -> Step:
        """A text from its start, without a cache: places 0 … T-1, causal, at most `window` keys back."""
        places = torch.arange(length, device=device)[None]
        banded = window is not None and window < length
        return Step(
            slots=places,
            near=places,
            far=places,
            own=places,
            keys=places,
            visible=None,
            sinks=0,
            span=length,
            band=Band(0, 0, 0, 0, length if window is None else window) if length > 1 else None,
            causal=not banded and length > 1,
        )


class KVStore(Protocol):
    """What one layer keeps between forwards."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [B, G, T, D] in; all that the T queries may meet [B, G, K, D] out."""
        ...


class NoCache:
    """The store of a forward without a cache: the queries see the keys that came with them."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward: a Step for each distinct window among the layers, and each layer's KVStore."""

    steps: Mapping[int | None, Step]  # by the model's own window of a layer; None: it has none
    stores: Sequence[KVStore]  # one per layer
    tensors: Sequence[Tensor] | None = (
        None  # all that differ from this plan to the next, if nothing else does
    )
    t: int | None = None  # the number of each row's one token, where nothing but that was asked for …
    by: Planner | None = None  # … and who knows the rest


class Planner(Protocol):
    """Who plans one token per row from its number, int64 [1], on the device and without a look at it."""

    @property
    def origin(self) -> int: ...
    def planned(self, t: Tensor, origin: Tensor | None = None) -> Plan: ...


class Cache(Protocol):
    """What a forward needs of a cache: plan, (compute,) commit."""

    @property
    def chunk(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    def plan(self, length: int, lengths: Sequence[int] | None) -> Plan: ...
    def commit(self, plan: Plan) -> None: ...


@dataclass(frozen=True)
class Geometry:
    """What a cache and a loop must know of a model, whatever its family."""

    kv_heads: int  # G
    head_dim: int  # D
    vocab_size: int  # V
    windows: tuple[int | None, ...]  # the model's own sliding window, per layer
    trained_length: int | None  # positions it was trained for; None: its encoding sets no end (ALiBi)


def geometry_of(model: nn.Module) -> Geometry:
    """The geometry of one of our models. Raises TypeError for a model of somebody else's."""
    geometry = getattr(model, "geometry", None)
    if not isinstance(geometry, Geometry):
        raise TypeError(
            f"{type(model).__module__}.{type(model).__name__} is not a model of this library; "
            f"load the checkpoint with streamllm.load"
        )
    return geometry


class Streamable(Protocol):
    """A model, as `forward_in_chunks` sees it."""

    @property
    def geometry(self) -> Geometry: ...
    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor: ...
    def project(self, x: Tensor) -> Tensor: ...


def forward_in_chunks(
    model: Streamable,
    tokens: Tensor,
    cache: Cache | None,
    lengths: Tensor | Sequence[int] | None,
    logits_to_keep: int | None,
) -> Tensor:
    """The forward of every model: int64 [B, T] -> logits [B, T, V], or [B, logits_to_keep, V].

    Without a cache, one dense plan. With one, T is cut into chunks; each is planned, computed and committed,
    so that after an exception the stream stands at the end of the last chunk that was whole. `lengths` [B]
    says how many tokens of each row are real, the rest being padding on the right; `logits_to_keep` then
    counts from the end of each row's own tokens (and repeats its first where a row has fewer). Gradients flow
    without a cache only.

    Raises ValueError for tokens that are no [B, T] of integers within the vocabulary, for lengths outside
    0 … T or without a cache, and for a batch that is not the cache's.
    """
    counts = _checked(model.geometry.vocab_size, tokens, cache, lengths, logits_to_keep)
    if cache is None:
        length = tokens.shape[1]
        windows = model.geometry.windows
        steps = {window: Step.dense(length, window, tokens.device) for window in set(windows)}
        x = model.hidden(tokens, Plan(steps, [NoCache()] * len(windows)))
        return model.project(x if logits_to_keep is None else x[:, -logits_to_keep:])
    return _in_chunks(model, tokens, cache, counts, logits_to_keep)


@torch.no_grad()  # a stream has no end at which its graph could be freed
def _in_chunks(
    model: Streamable, tokens: Tensor, cache: Cache, counts: list[int] | None, logits_to_keep: int | None
) -> Tensor:
    length = tokens.shape[1]
    kept: list[Tensor] = []  # the rows somebody reads: projected if all are, else [B, n, C]
    for start in range(0, length, cache.chunk):
        part = tokens[:, start : start + cache.chunk]
        stop = start + part.shape[1]
        real = None if counts is None else [min(max(count - start, 0), stop - start) for count in counts]
        plan = cache.plan(stop - start, real)
        x = model.hidden(part, plan)
        if logits_to_keep is None:
            kept.append(model.project(x))
        elif counts is None:
            if stop > length - logits_to_keep:  # an empty part would hold on to the whole chunk
                kept.append(x[:, max(0, length - logits_to_keep - start) :])
        else:
            kept = [_last_rows(x, start, counts, logits_to_keep, kept[0] if kept else None)]
        if stop == length:  # projected before the commit: a forward that fails has not happened
            joined = kept[0] if len(kept) == 1 else torch.cat(kept, 1)
            logits = joined if logits_to_keep is None else model.project(joined)
        cache.commit(plan)
    return logits


def _last_rows(x: Tensor, start: int, counts: Sequence[int], keep: int, before: Tensor | None) -> Tensor:
    """[B, keep, C] of each row's last real tokens, as far as the chunk x at `start` has them."""
    wanted = torch.tensor([[max(count - keep + i, 0) - start for i in range(keep)] for count in counts])
    inside = ((wanted >= 0) & (wanted < x.shape[1])).to(x.device)[:, :, None]
    rows = wanted.clamp(0, x.shape[1] - 1).to(x.device)[:, :, None].expand(-1, -1, x.shape[2])
    found = x.gather(1, rows)
    return found if before is None else torch.where(inside, found, before)


def _checked(
    vocab_size: int,
    tokens: Tensor,
    cache: Cache | None,
    lengths: Tensor | Sequence[int] | None,
    logits_to_keep: int | None,
) -> list[int] | None:
    """The lengths as a list, or None where every token is real."""
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be int64 or int32 of shape [batch, length] with at least one of each, "
            f"not {tokens.dtype} of shape {list(tokens.shape)}"
        )
    if tokens.device.type == "cpu":  # elsewhere the look would stall the device
        ends = [int(end) for end in ([tokens] if tokens.numel() == 1 else torch.aminmax(tokens))]
        lowest, highest = ends[0], ends[-1]
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of 0 … {vocab_size - 1}")
    if logits_to_keep is not None and logits_to_keep < 1:
        raise ValueError(f"logits_to_keep must be at least 1 (None: all), not {logits_to_keep}")
    if cache is None:
        if lengths is not None:
            raise ValueError("lengths need a cache: without one every row is a whole text of its own")
        return None
    batch, length = tokens.shape
    if batch != cache.batch_size:
        raise ValueError(
            f"the cache was made for a batch of {cache.batch_size}, the tokens have {batch} rows"
        )
    if lengths is None:
        return None
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    try:
        counts = [index(count) for count in given]
    except TypeError:
        counts = []
    if len(counts) != batch or not all(0 <= count <= length for count in counts):
        raise ValueError(f"lengths must be {batch} whole numbers in 0 … {length}, one per row, not {given}")
    return None if all(count == length for count in counts) else counts
