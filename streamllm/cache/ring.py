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

from streamllm.cache.memory import zeros
from streamllm.models.step import Step

if TYPE_CHECKING:
    from streamllm.cache.int8_ring import Int8Ring

# A ring that fills is read in steps of so many slots, because CPU kernels are prepared anew for each size. While few
# slots are held, the steps are a quarter of it: a batch of short streams then reads half as much.
READ_STEP_SLOTS = 256
# The steps of what is recorded or compiled are wider, so that few recordings serve a window that fills.
RECORDED_STEP_FACTOR = 4

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


@dataclass(frozen=True)
class TokenKind:
    """What the kernels of a one-token forward depend on, for one ring: the rest is in numbers on the device."""

    rows: int  # R: 1 where all rows of the batch stand at the same place, else B
    reads: int  # slots that are read
    full: bool  # each row sees all of them: no mask
    gap: bool  # the first place behind the sinks is a number on the device, too
    apart: bool  # the sinks meet a query of their own
    to_sinks: bool  # some row may take the slot of a sink …
    to_ring: bool  # … or one in the ring


def token_kind(
    layout: Layout,
    origin: int,
    seen: Sequence[int],
    starts: Sequence[int] | None,
    lockstep: bool,
    recorded: bool,
    for_any_place: bool,
) -> TokenKind:
    """The kind of the next token of rows at the places `seen`; see `SinkCache.token_kinds`.

    starts: by row; None where no row has a gap. lockstep: whether all rows have the same places and starts.
    """
    most, least, slots = max(seen) + 1, min(seen) + 1, layout.slots
    if recorded:
        reads = READ_STEP_SLOTS
        while reads < most or reads <= layout.sinks:
            reads *= RECORDED_STEP_FACTOR
    else:
        step = max(1, READ_STEP_SLOTS // 4) if most <= 2 * READ_STEP_SLOTS else READ_STEP_SLOTS
        reads = -(-most // step) * step
    reads = min(reads, slots)
    full = not for_any_place and least >= (slots if recorded else reads)
    if starts is not None:  # a row that sees W recent tokens sees all slots
        full = full and all(t + 1 - start >= layout.window for t, start in zip(seen, starts, strict=True))
    return TokenKind(
        rows=1 if lockstep else len(seen),
        reads=reads,
        full=full,
        gap=not full and (recorded or starts is not None),
        apart=layout.sinks > 0 and (recorded or origin > 0 or most > slots or starts is not None),
        to_sinks=layout.sinks > 0 and (not full if recorded else min(seen) < layout.sinks),
        to_ring=recorded or max(seen) >= layout.sinks,
    )


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


class Ring:
    """Keys and values [B, G, S + W, D]: the sinks, then W slots that are taken in turn."""

    def __init__(self, shape: Shape, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        batch, heads, dim = shape
        self.dtype = dtype
        self.keys = zeros((batch, heads, layout.slots, dim), dtype, device)
        if dtype == torch.float32 and device.type == "cpu":
            # Stored [B, G, D, S + W]: one query reads them 1.1 to 1.5 times as fast.
            # tools/bench.py decode, AMD EPYC, 2026-11.
            self.values = zeros((batch, heads, dim, layout.slots), dtype, device).transpose(2, 3)
        else:
            self.values = zeros((batch, heads, layout.slots, dim), dtype, device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, each [(2,) B, G, slots, …]."""
        return {"keys": self.keys, "values": self.values}

    def first(self, slots: int) -> dict[str, Tensor]:
        """The part of `tensors` that the first so many slots take."""
        return {name: tensor[:, :, :slots] for name, tensor in self.tensors.items()}

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
