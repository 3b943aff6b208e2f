"""Which entries each stream holds, and what is left after some are taken out.

A layer's list of entries is the sinks and one run of consecutive places behind them: `start` … t - 1. An eviction
keeps it one run. Where it takes entries out of the middle, those on the shorter side of the gap move: their keys are
rotated by as many places as were taken out, and take the slots of their new places. Taking the oldest or the newest
recent entries moves nothing.

Why keys move: the part before a gap could stay, and meet a query of its own, as the sinks do. Then each token would pay
for each gap, and recordings would depend on their number. Moving costs one more rounding of the moved keys. The error
of the logits after 16 evictions from the middle of a window of 64, against 16 that move nothing: float32 the same,
bfloat16 1.05 times, int8 1.7 times (1.0 times each after one). tools/eviction.py, AMD EPYC, 2026-11.

The functions are pure. t is the place of a row's next token, counted from 0 whatever the origin. `layouts` are the
sizes of the lists, one for each distinct window of the model's layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.ring import Layout, Ring


@dataclass(frozen=True)
class Row:
    """What one stream holds, besides t."""

    # For each distinct window: the place of the first recent entry that was not taken out. S where none was.
    starts: tuple[int, ...]
    ahead: int = 0  # tokens seen minus t: how many places t went back when the newest entries were taken out
    # One more than the highest place ever written, where that is above t. A forward that failed, or was undone, has
    # overwritten what stood W places before.
    highest: int = 0
    lowest: int = 0  # t cannot go back below it exactly; 0: nothing that was pushed out is missing there

    @staticmethod
    def fresh(layouts: Sequence[Layout]) -> Row:
        """A stream from which nothing was taken out."""
        return Row(tuple(layout.sinks for layout in layouts))


@dataclass(frozen=True)
class Shift:
    """The entries of one list at the places `first` … `stop` - 1 move by `by` places. Empty: nothing moves."""

    first: int
    stop: int
    by: int


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch. Replaced as a whole, never changed in place. Each method takes t of each row."""

    rows: tuple[Row, ...]
    layouts: tuple[Layout, ...]

    @staticmethod
    def fresh(batch_size: int, layouts: Sequence[Layout]) -> Rows:
        return Rows((Row.fresh(layouts),) * batch_size, tuple(layouts))

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """By distinct window, then by row."""
        return tuple(zip(*(row.starts for row in self.rows), strict=True))

    @cached_property
    def with_gap(self) -> bool:
        """Whether the first recent entry of some row does not follow its sinks."""
        sinks = self.layouts[0].sinks
        return any(start > sinks for row in self.rows for start in row.starts)

    @cached_property
    def agree(self) -> bool:
        """Whether all rows have the same starts."""
        return all(row.starts == self.rows[0].starts for row in self.rows)

    def changed(self, changed: Mapping[int, Row]) -> Rows:
        """With other rows in place of some, by number."""
        return replace(self, rows=tuple(changed.get(number, row) for number, row in enumerate(self.rows)))

    def written(self, t: Sequence[int], ahead: int) -> Rows:
        """Where each row has been written up to place t + `ahead` - 1."""
        return replace(
            self,
            rows=tuple(
                replace(row, highest=max(row.highest, at + ahead))
                for row, at in zip(self.rows, t, strict=True)
            ),
        )

    def seen(self, t: Sequence[int]) -> list[int]:
        return [at + row.ahead for row, at in zip(self.rows, t, strict=True)]

    def held(self, t: Sequence[int]) -> list[int]:
        return [held(row, at, self.layouts) for row, at in zip(self.rows, t, strict=True)]

    def rewindable(self, t: Sequence[int]) -> list[int]:
        return [rewindable(row, at, self.layouts) for row, at in zip(self.rows, t, strict=True)]

    def evicted(
        self, t: Sequence[int], ranges: Mapping[int, tuple[int, int]]
    ) -> tuple[list[int], Rows, dict[tuple[Shift, ...], list[int]]]:
        """Without a range of entries of some rows: t, the rows, and what moves in the lists of which rows."""
        to, changed = list(t), {}
        moves: dict[tuple[Shift, ...], list[int]] = defaultdict(list)
        for number, (start, stop) in ranges.items():
            if start < stop:
                row = self.rows[number]
                to[number], changed[number], shifts = without(row, t[number], self.layouts, start, stop)
                moves[shifts].append(number)
        return to, self.changed(changed), moves

    def rewound(self, t: Sequence[int], rows: Sequence[int], count: int) -> tuple[list[int], Rows]:
        """t and the rows, some of them before their last `count` tokens."""
        to, changed = list(t), {}
        for number in rows:
            to[number], changed[number] = rewound(self.rows[number], t[number], self.layouts, count)
        return to, self.changed(changed)


def held(row: Row, t: int, layouts: Sequence[Layout]) -> int:
    """The entries of the longest list."""
    layout, start = max(zip(layouts, _starts(row, t, layouts), strict=True), key=lambda pair: pair[0].window)
    return min(t, layout.sinks) + max(0, t - start)


def without(
    row: Row, t: int, layouts: Sequence[Layout], start: int, stop: int
) -> tuple[int, Row, tuple[Shift, ...]]:
    """t and the row without the entries `start` … `stop` - 1 of its longest list, and what moves in each list.

    S = 2, W = 6, t = 20: the recent entries stand at the places 14 … 19. Without the entries 3 and 4 (the places 15
    and 16), place 14 moves to 16: the run is 16 … 19. Without the entries 6 and 7 (18 and 19), nothing moves, and
    t goes back to 18.
    """
    first, lowest = _starts(row, t, layouts), _lowest(row, t, layouts)
    longest = max(range(len(layouts)), key=lambda number: layouts[number].window)
    low = first[longest] + start - layouts[longest].sinks
    high = low + stop - start
    gap = high - low
    if low - first[longest] <= t - high:  # the older side moves up to the gap's end
        starts = tuple(at + gap if at <= low else max(at, high) for at in first)
        shifts = tuple(Shift(at, max(at, low), gap) for at in first)
        to = t
    else:  # the newer side moves down to the gap's start, and t with it
        starts = tuple(min(at, low) if at <= high else at - gap for at in first)
        shifts = tuple(Shift(max(at, high), t, -gap) for at in first)
        to = t - gap
    return to, Row(starts, row.ahead + t - to, to, to if lowest else 0), shifts


def rewindable(row: Row, t: int, layouts: Sequence[Layout]) -> int:
    """How many of the newest tokens can be taken back so that all they pushed out is there again."""
    lowest = _lowest(row, t, layouts)
    return max(0, t - lowest) if lowest else held(row, t, layouts)


def rewound(row: Row, t: int, layouts: Sequence[Layout], count: int) -> tuple[int, Row]:
    """t and the row before its last `count` tokens, of which there are at most `rewindable`."""
    seen = t + row.ahead - count
    if not count:
        return t, row
    if t - count >= row.starts[0]:
        return t - count, replace(row, highest=max(row.highest, t))
    left = held(row, t, layouts) - count  # no recent entry is left: the gap goes, too
    return left, replace(Row.fresh(layouts), ahead=seen - left)


def _starts(row: Row, t: int, layouts: Sequence[Layout]) -> tuple[int, ...]:
    """The first place of each list's run."""
    highest = max(row.highest, t)
    return tuple(
        max(start, highest - layout.window) for start, layout in zip(row.starts, layouts, strict=True)
    )


def _lowest(row: Row, t: int, layouts: Sequence[Layout]) -> int:
    """The lowest t to which the row can go back exactly; 0 where nothing was pushed out of any list."""
    highest = max(row.highest, t)
    pushed_out = any(
        highest - start > layout.window for start, layout in zip(row.starts, layouts, strict=True)
    )
    return max(row.lowest, highest - 1) if pushed_out else row.lowest


class MovedEntries:
    """Entries of one layer on their way to other slots. They are read at once, and stored by `commit`."""

    def __init__(
        self,
        ring: Ring | Int8Ring,
        layout: Layout,
        rows: Sequence[int],
        shift: Shift,
        turn: Callable[[Tensor], Tensor],
    ) -> None:
        device = next(iter(ring.tensors.values())).device
        places = torch.arange(shift.first, shift.stop, device=device, dtype=torch.int64)
        self._ring = ring
        self._rows = torch.tensor(rows, device=device, dtype=torch.int64)[:, None]  # [r, 1]
        self._slots = layout.slot_of(places + shift.by)  # [n]
        self._entries = ring.take(self._rows, layout.slot_of(places), turn)

    def commit(self) -> None:
        """Store the entries. To do it again changes nothing."""
        self._ring.replace(self._rows, self._slots, *self._entries)
