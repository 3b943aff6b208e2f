"""One layer's ring: the slots of new tokens, what these see, and the keys and values in memory.

The planning functions are pure: from token counts to a Step and its Writes.

t counts the tokens of a row from 0. `origin` is the place of the first token in the text: it is added to the
places of recent tokens at the end. Slots 0 … S-1 hold the sinks, the W slots behind them a ring of recent tokens.
`start` is the first place behind the sinks that a query may see: S, or more where entries were taken out (entries.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from streamllm.cache.token_kinds import TokenKind
from streamllm.models.step import Band, Step, is_visible

if TYPE_CHECKING:
    from streamllm.cache.int8_ring import Int8Ring

Index = TypeVar("Index", int, Tensor)
Shape = tuple[int, int, int]  # B, G, D


@dataclass(frozen=True)
class Layout:
    """The sizes of one ring."""

    sinks: int  # S
    window: int  # W

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    def slot_of(self, t: Index) -> Index:
        """The slot that token t takes. S = 2, W = 3: the tokens 0 … 9 take the slots 0 1 2 3 4 2 3 4 2 3."""
        ring = self.sinks + (t - self.sinks) % self.window
        return torch.minimum(t, ring) if isinstance(t, Tensor) else min(t, ring)

    def token_in(self, slot: Tensor, seen: Tensor) -> Tensor:
        """The token that a slot holds after `seen` tokens; -1 for an empty slot. Broadcasts."""
        newest = seen - 1
        recent = newest - (newest - slot) % self.window
        return torch.where(slot > newest, -1, torch.where(slot < self.sinks, slot, recent))

    def sink_query_place(self, t: Tensor, start: Index | None = None) -> Tensor:
        """The place of query t for the sinks: they travel with the window, and close up to the place `start`."""
        rank = t if start is None else t - (start - self.sinks)
        return rank.clamp(max=self.slots - 1)


@dataclass(frozen=True, eq=False)
class Move:
    """New tokens and the slots that they take: index tensors of equal length."""

    rows: Tensor | None  # None: all rows of the batch move the same tokens to the same slots
    tokens: Tensor | None  # None: all T tokens
    slots: Tensor
    to_sinks: bool  # whether some of the slots may be sinks …
    to_ring: bool  # … or in the ring
    # The same as ranges, where that is known: first token, first slot, and how many.
    ranges: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Writes:
    """What a layer writes and reads in one forward.

    A single token takes its slot before attention: what it overwrites is out of its own window. So do new
    sinks of a chunk: nothing was there. The other tokens of a chunk wait for the commit, because earlier
    queries of the chunk, or a retry after an error, still need what they overwrite.
    """

    reads: tuple[tuple[int, int], ...]  # ranges of slots that the queries meet, the sinks first
    now: Move | None
    on_commit: Move | None  # not None for a chunk: its keys are met behind the slots


def plan_token(
    layout: Layout, origin: int | Tensor, kind: TokenKind, t: Tensor, start: Tensor
) -> tuple[Step, Writes]:
    """One token per row: t and start int64 [R] on the cache's device. No value of a tensor is read here.

    S = 2, W = 3, t = 9: slot 2 + (9 - 2) % 3 = 3, where token 6 was; see `Step`.
    """
    t, start = t[:, None], start[:, None]  # [R, 1]
    slots = layout.slot_of(t)
    moved = isinstance(origin, Tensor) or origin > 0
    query_place = t + origin if moved else t
    slot = torch.arange(kind.reads, device=t.device, dtype=torch.int64)[None]  # [1, K]
    held = layout.token_in(slot, t + 1)  # [R, K]
    visible = None if kind.full else held >= 0
    if visible is not None and kind.gap:
        visible = visible & ((slot < layout.sinks) | (held >= start))
    new_key_place, key_place = query_place, held
    if moved:
        key_place = torch.where(slot < layout.sinks, held, held + origin)
        if kind.to_sinks:
            new_key_place = torch.where(t < layout.sinks, t, query_place)
    step = Step(
        slots=slots,
        query_place=query_place,
        sink_query_place=layout.sink_query_place(t, start if kind.gap else None),
        new_key_place=new_key_place,
        key_place=key_place,
        visible=None if visible is None else visible[:, None],
        sinks=min(layout.sinks, kind.reads) if kind.apart else 0,
        rope_length=layout.slots,
    )
    rows = None if len(t) == 1 else torch.arange(len(t), device=t.device, dtype=torch.int64)
    tokens = None if rows is None else torch.zeros_like(rows)
    move = Move(rows, tokens, slots[:, 0], kind.to_sinks, kind.to_ring)
    return step, Writes(((0, kind.reads),), move, None)


def plan_chunk(
    layout: Layout,
    origin: int,
    seen: int,
    start: int,
    length: int,
    device: torch.device,
    sinks_differ: bool = False,
) -> tuple[Step, Writes]:
    """T tokens, all rows in lockstep. They meet the sinks, the tokens held behind them in order, and each other.

    New sinks are written at once and hidden among the chunk's own keys. While nothing has left a text that began
    in this cache, the keys are the whole text in order, and each query sees all before it.
    sinks_differ: the ring stores sinks with other numbers than a chunk's own keys.

    S = 2, W = 3, 4 tokens after 7: the slots hold 0 1 5 6 4, of which the first query, 7, sees 0 1 and 5 6. So
    the keys are 0 1, then the run 5 6 7 8 9 10. Tokens 8 9 10 are written on commit.
    """
    sinks, window = layout.sinks, layout.window
    end = seen + length
    columns = min(sinks, end)
    held = max(0, min(seen - start, window - 1))  # tokens behind the sinks that the first query sees
    first = seen - held
    slot = layout.slot_of(max(first, sinks))
    ahead = min(held, layout.slots - slot)  # of them, those up to the end of the ring
    ranges = (0, columns), (slot, slot + ahead), (sinks, sinks + held - ahead)
    reads = tuple(part for part in ranges if part[0] < part[1])

    places = torch.arange(seen, end, device=device, dtype=torch.int64)[None]
    slots = layout.slot_of(places)
    whole = origin == 0 and end <= layout.slots and start == sinks
    apart = sinks > 0 and not whole
    band = Band(seen, first, columns, sinks, window)
    if whole and (seen >= sinks or (seen == 0 and not sinks_differ)):
        band = Band(seen, 0, 0, 0, layout.slots)
        if seen == 0:
            columns, reads = 0, ()
    run = torch.arange(origin + first, origin + end, device=device, dtype=torch.int64)
    step = Step(
        slots=slots,
        query_place=places + origin,
        sink_query_place=layout.sink_query_place(places, start),
        new_key_place=_key_place(layout, origin, places),
        key_place=torch.cat((torch.arange(columns, device=device, dtype=torch.int64), run))[None],
        visible=None,
        sinks=columns if apart else 0,
        rope_length=layout.slots,
        band=band,
    )
    tokens = torch.arange(length, device=device, dtype=torch.int64)
    new_sinks = max(0, min(sinks, end) - seen)
    kept = max(0, sinks - seen, length - window)  # earlier tokens are sinks, or gone before the chunk ends
    free = layout.slot_of(seen + kept)
    to_end = min(
        length - kept, layout.slots - free
    )  # of the tokens that stay, those up to the end of the ring
    moved = (kept, free, to_end), (kept + to_end, sinks, length - kept - to_end)
    return step, Writes(
        reads=reads,
        now=Move(None, tokens[:new_sinks], slots[0, :new_sinks], True, False) if new_sinks else None,
        on_commit=Move(None, tokens[kept:] if kept else None, slots[0, kept:], False, True, moved),
    )


def plan_ragged_chunk(
    layout: Layout,
    origin: int,
    seen: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    length: int,
    device: torch.device,
) -> tuple[Step, Writes]:
    """T tokens per row, of which `counts` are real. They meet the slots in their order, and behind them each other.

    S = 2, W = 3, 4 tokens on an empty row: 2 slots are read, so the keys are the slots 0 1 and the tokens
    0 1 2 3. Tokens 0 and 1 are written first and hidden behind: token 3 sees keys at the places 0 1 - - 2 3.
    """
    sinks, window = layout.sinks, layout.window
    first, start = (
        torch.tensor(given, dtype=torch.int64, device="cpu")[:, None] for given in (seen, starts)
    )  # [R, 1]
    end = first + torch.tensor(counts, dtype=torch.int64, device="cpu")[:, None]
    reads = max(min(max(seen), layout.slots), min(int(end.max()), sinks))
    column = torch.arange(length, dtype=torch.int64, device="cpu")
    places = first + column  # [R, T]
    real = column < end - first
    is_sink = places < sinks
    slots = layout.slot_of(places)
    slot = torch.arange(reads, dtype=torch.int64, device="cpu")
    # A slot holds what it held before the chunk, or a sink that the chunk brings.
    held = torch.where((slot < sinks) & (slot < end), slot, layout.token_in(slot, first))
    held = torch.where((slot < sinks) | (held >= start), held, -1)
    keys = torch.cat((held, torch.where(real & is_sink, -1, places)), 1)  # [R, reads + T]
    apart = sinks > 0 and (origin > 0 or int(places.max()) >= layout.slots or max(starts) > sinks)
    columns = min(sinks, reads) if apart else 0
    shifted = torch.arange(keys.shape[1], dtype=torch.int64, device="cpu") >= columns
    step = Step(
        slots=slots.to(device),
        query_place=(places + origin).to(device),
        sink_query_place=layout.sink_query_place(places, start).to(device),
        new_key_place=_key_place(layout, origin, places).to(device),
        key_place=torch.where(shifted, keys + origin, keys).to(device),
        visible=is_visible(keys[:, None, :], places[:, :, None], sinks, window).to(device),
        sinks=columns,
        rope_length=layout.slots,
    )
    recent = real & ~is_sink & (places >= end - window)
    new_sinks = real & is_sink
    return step, Writes(
        reads=((0, reads),),
        now=_move(new_sinks, slots, device, to_sinks=True) if bool(new_sinks.any()) else None,
        on_commit=_move(recent, slots, device, to_sinks=False),
    )


def _key_place(layout: Layout, origin: int, t: Tensor) -> Tensor:
    """The place where the key of token t is rotated, once."""
    return torch.where(t < layout.sinks, t, t + origin) if origin else t


def _move(chosen: Tensor, slots: Tensor, device: torch.device, to_sinks: bool) -> Move:
    """The chosen [R, T] tokens and their slots."""
    rows, tokens = chosen.nonzero(as_tuple=True)
    taken = slots[rows, tokens].to(device)
    return Move(rows.to(device), tokens.to(device), taken, to_sinks, not to_sinks)


class Ring:
    """Keys and values [B, G, S + W, D]: the sinks, then W slots that are taken in turn."""

    def __init__(self, shape: Shape, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        batch, heads, dim = shape
        self.dtype = dtype
        self.keys = torch.zeros(batch, heads, layout.slots, dim, dtype=dtype, device=device)
        if dtype == torch.float32 and device.type == "cpu":
            # Stored [B, G, D, S + W]: one query reads them 1.1 to 1.5 times as fast.
            # tools/bench.py decode, AMD EPYC, 2026-11.
            values = torch.zeros(batch, heads, dim, layout.slots, dtype=dtype, device=device)
            self.values = values.transpose(2, 3)
        else:
            self.values = torch.zeros_like(self.keys)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, each [(2,) B, G, slots, …]."""
        return {"keys": self.keys, "values": self.values}

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [B, G, T, D] as the ring stores recent ones."""
        return k, v

    def write_now(self, move: Move, k: Tensor, v: Tensor) -> None:
        """Store new keys and values, sinks or recent ones."""
        self.write(move, k, v)

    def write(self, move: Move, k: Tensor, v: Tensor) -> None:
        """Store what `encode` returned."""
        for store, new in ((self.keys, k), (self.values, v)):
            if not move.ranges:
                put(store, move, move.slots, new)
            for token, slot, count in move.ranges:
                if count > 0:
                    store.narrow(2, slot, count).copy_(new.narrow(2, token, count))

    def take(self, rows: Tensor, slots: Tensor, turn: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Recent entries of `rows` [r, 1] in `slots` [n]: the turned keys and the values, [r, n, G, D] each."""
        return turn(self.keys[rows, :, slots]), self.values[rows, :, slots]

    def replace(self, rows: Tensor, slots: Tensor, *taken: Tensor) -> None:
        """Store what `take` returned in other slots."""
        for store, entries in zip(self.tensors.values(), taken, strict=True):
            store[..., rows, :, slots, :] = entries

    def read(self, ranges: Sequence[tuple[int, int]], *chunk: Tensor) -> tuple[Tensor, Tensor]:
        """The slots in `ranges`, and behind them an encoded chunk: keys and values [B, G, K, D]."""
        if not chunk:
            ((start, stop),) = ranges
            return self.keys[:, :, start:stop], self.values[:, :, start:stop]
        k, v = chunk
        return (
            in_a_row([*(self.keys[:, :, start:stop] for start, stop in ranges), k]),
            in_a_row([*(self.values[:, :, start:stop] for start, stop in ranges), v]),
        )


def in_a_row(parts: Sequence[Tensor]) -> Tensor:
    """Parts [B, G, …, D], one behind the other."""
    if not parts[0].is_cuda:
        return torch.cat(list(parts), 2)
    # torch's kernel that joins parts of unequal strides reaches half the speed of plain copies.
    out = parts[0].new_empty(*parts[0].shape[:2], sum(part.shape[2] for part in parts), parts[0].shape[3])
    sizes = [part.shape[2] for part in parts]
    for place, part in zip(torch.split(out, sizes, 2), parts, strict=True):
        place.copy_(part)
    return out


def put(store: Tensor, move: Move, slots: Tensor, new: Tensor) -> None:
    """New tokens [(2,) B, G, T, …] to their slots in a store [(2,) B, G, slots, …]."""
    if move.rows is not None:
        store[..., move.rows, :, slots, :] = new[..., move.rows, :, move.tokens, :]
    else:
        store.index_copy_(-2, slots, new if move.tokens is None else new.index_select(-2, move.tokens))


class LayerStore:
    """One layer's ring during one forward."""

    def __init__(self, ring: Ring | Int8Ring, writes: Writes) -> None:
        self.ring, self.writes = ring, writes
        self._chunk: tuple[Tensor, Tensor] | None = None  # encoded, until it is committed

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.write(k, v)
        return self.ring.read(self.writes.reads, *(self._chunk or ()))

    def write(self, k: Tensor, v: Tensor) -> None:
        """Take new keys and values, without a look at what is stored."""
        ring, writes = self.ring, self.writes
        if not k.dtype == v.dtype == ring.dtype:
            raise _wrong_type(ring.dtype, k, v)
        if writes.now is not None:
            ring.write_now(writes.now, k, v)
        if writes.on_commit is not None:
            self._chunk = ring.encode(k, v)

    def commit(self) -> None:
        """Store the chunk. To do it again changes nothing."""
        if self._chunk is not None and self.writes.on_commit is not None:
            self.ring.write(self.writes.on_commit, *self._chunk)


def _wrong_type(dtype: torch.dtype, k: Tensor, v: Tensor) -> ValueError:
    name, given = ("keys", k) if k.dtype != dtype else ("values", v)
    return ValueError(
        f"the cache was made for {dtype}, and the model's {name} are {given.dtype}: make a SinkCache for the "
        f"model as it is"
    )
