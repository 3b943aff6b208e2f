"""The streams of one engine: each has its own cache, all share one memory, and a forward takes a token of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from operator import is_
from typing import TypeVar

import torch
from torch import Tensor

from streamllm.cache.entries import Row, Rows
from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.ring import Ring
from streamllm.cache.rolling_cache import ForwardGuard
from streamllm.cache.sink_cache import SinkCache
from streamllm.cache.state import slots_written

AnyRing = Ring | Int8Ring
Cache = TypeVar("Cache", bound=SinkCache)
Rings = list[tuple["int | None", AnyRing]]  # of each layer: its own window, and its ring
BATCH_AXIS = -4  # of every tensor of a ring: [(2,) B, G, slots, D or 1]


class RowsApart(SinkCache):
    """The first n rows of a memory, for forwards of one token per row.

    Rows count as being at different places even where their places agree, so that one recording serves them at any
    places. It keeps no state between two forwards: `gather` takes the state of each row's own cache.
    """

    @property
    def _in_lockstep(self) -> bool:
        return False

    def gather(self, rows: Sequence[SinkCache | None]) -> None:
        """Take over the places of these caches. None: a row without a stream, at place 0.

        The forward writes a key into the slot of the next token of each row, also where the row does not
        advance. That key is overwritten by the next token, and what it overwrites is outside that token's window.
        """
        layouts = self._rows.layouts
        fresh = Row.fresh(layouts)
        places, states = [], []
        for row in rows:
            if row is None:
                places.append(0)
                states.append(fresh)
                continue
            row.finish_commit()
            row._begun = row._t
            places.append(row._t[0])
            states.append(row._rows.rows[0])
        known = self._rows
        same = all(map(is_, known.rows, states))  # unchanged: what was derived from them stays valid
        self._state = places, (), known if same else Rows(tuple(states), layouts)


def first_rows(memory: SinkCache, count: int) -> RowsApart:
    """The first `count` rows of a memory."""
    made = _without_memory(RowsApart, memory, count)
    made._rings = [(own, _part(ring, 0, count)) for own, ring in memory._rings]
    return made


def row_without_memory(memory: SinkCache) -> SinkCache:
    """The cache of one empty stream, to be placed in a memory. Until then it has settings, but takes no tokens."""
    return _without_memory(SinkCache, memory, 1)


def place_row(row: SinkCache, memory: SinkCache, number: int, used: int) -> None:
    """Move the stream of `row` to row `number` of the memory, with the entries that it holds.

    used: how many slots of that row were written by other streams.
    """
    rings = [(own, _part(ring, number, number + 1)) for own, ring in memory._rings]
    with torch.inference_mode():  # NaN or infinity must not stay: a masked value is multiplied by 0
        for _, ring in rings:
            for tensor in ring.first(used).values():
                tensor.zero_()
    move_row(row, rings)


def move_row(row: SinkCache, rings: Rings) -> None:
    """Move the stream of `row` to other rings, with the entries that it holds, if it has memory."""
    row.finish_commit()
    if not row._rings:
        row._rings = rings
        return
    slots = slots_used(row)
    with torch.inference_mode():
        for (_, new), (_, old) in zip(rings, row._rings, strict=True):
            for target, source in zip(new.first(slots).values(), old.first(slots).values(), strict=True):
                target.copy_(source)
    row._rings = rings


def slots_used(row: SinkCache) -> int:
    """How many slots of its memory the stream may have written."""
    return slots_written(row._written_rows().rows, row._t)


def rings_of(row: SinkCache) -> Rings:
    """The memory of the stream; empty for a stream without memory."""
    return row._rings


def new_rings(memory: SinkCache) -> Rings:
    """Memory for one stream by itself, filled with zeros."""
    with torch.inference_mode(False):
        return memory._new_rings(1)


def _without_memory(kind: type[Cache], memory: SinkCache, rows: int) -> Cache:
    made = object.__new__(kind)
    made.__dict__.update(vars(memory))
    layouts = memory._rows.layouts
    made.batch_size, made.guard = rows, ForwardGuard()
    made._rings, made._begun, made._trim = [], None, False
    made._state = [0] * rows, (), Rows.fresh(rows, layouts)
    made._written = made._rows.starts
    with torch.inference_mode(False):
        made._starts = torch.full((len(layouts), rows), memory.sinks, dtype=torch.int64, device=memory.device)
    return made


def _part(ring: AnyRing, start: int, stop: int) -> AnyRing:
    return _changed(ring, lambda tensor: tensor.narrow(BATCH_AXIS, start, stop - start))


def _changed(ring: AnyRing, change: Callable[[Tensor], Tensor]) -> AnyRing:
    made = copy(ring)
    for name, tensor in vars(ring).items():
        if isinstance(tensor, Tensor):
            setattr(made, name, change(tensor))
    return made
