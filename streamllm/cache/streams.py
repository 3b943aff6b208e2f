"""Streams: what the rows of a cache hold. Entries are taken out, tokens taken back, states copied and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

from streamllm.cache.checks import (
    check_at_least,
    check_range,
    check_rewind,
    check_room,
    check_up_to,
    row_numbers,
)
from streamllm.cache.entries import MovedEntries, Row, Rows
from streamllm.cache.guard import ForwardGuard
from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.ring import LayerStore, Layout, Ring
from streamllm.cache.state import STATE_VERSION, check_state, rows_of_state, state_of_rows
from streamllm.models.rotary import Rope, moved_keys

RINGS: dict[str | None, type[Ring] | type[Int8Ring]] = {None: Ring, "int8": Int8Ring}


class Streams:
    """The part of a `SinkCache` that needs no plan: the rings, and which entries each row holds in them."""

    def __init__(
        self,
        layouts: Mapping[int | None, Layout],
        rings: Sequence[tuple[int | None, Ring | Int8Ring]],
        sinks: int,
        window: int,
        batch_size: int,
        origin: int,
        quantize: str | None,
        rope: Rope | None,
    ) -> None:
        """layouts: by the layers' own window. rings: the own window of each layer, and its ring."""
        self._layouts, self._rings, self._rope = dict(layouts), list(rings), rope
        self.sinks, self.window, self.origin = sinks, window, origin
        self.batch_size, self.quantize = batch_size, quantize
        self.guard = ForwardGuard()
        fresh = Rows.fresh(batch_size, tuple(self._layouts.values()))
        # t of each row, what an unfinished commit has still to store, and what was taken out of each row. One
        # attribute, replaced as a whole: an interrupt cannot split them.
        self._state: tuple[list[int], Sequence[LayerStore | MovedEntries], Rows] = (
            [0] * batch_size,
            (),
            fresh,
        )
        self._begun: list[int] | None = None  # the t of each row for which a single token was last begun

    @property
    def _t(self) -> list[int]:
        """The place of each row's next token, without the origin."""
        return self._state[0]

    @property
    def _rows(self) -> Rows:
        return self._state[2]

    @property
    def seen(self) -> Tensor:
        """How many tokens each stream has taken in: int64 [B], on the CPU."""
        return torch.tensor(self.seen_counts, dtype=torch.int64, device="cpu")

    @property
    def seen_counts(self) -> list[int]:
        """`seen` as a list, which takes less time: a loop asks several times for each token."""
        return self._rows.seen(self._t)

    @property
    def held(self) -> Tensor:
        """How many entries each stream holds, sinks included: int64 [B], on the CPU. At most sinks + window.

        A single token that failed, or was undone, has already pushed out the entry that it pushes out.
        """
        return torch.tensor(self._written_rows().held(self._t), dtype=torch.int64, device="cpu")

    @property
    def rewindable(self) -> Tensor:
        """How many of its newest tokens each stream can `rewind`: int64 [B], on the CPU."""
        return torch.tensor(self._written_rows().rewindable(self._t), dtype=torch.int64, device="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the same from the first token to the last."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All keys and values as they are stored, layer by layer."""
        return [tensor for _, ring in self._rings for tensor in ring.tensors.values()]

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Forget the streams in `rows` (None: all). They start again from nothing.

        Raises ValueError for anything but row numbers; a mask of True and False is not a list of rows.
        """
        chosen = row_numbers(rows, self.batch_size)
        with self.guard:
            if len(chosen) < self.batch_size:
                self.finish_commit()
            t = [0 if row in chosen else t for row, t in enumerate(self._t)]
            fresh = Row.fresh(self._rows.layouts)
            self._state = t, (), self._written_rows().changed(dict.fromkeys(chosen, fresh))
            for tensor in self.tensors():
                tensor[..., chosen, :, :, :] = 0

    def step_back(self) -> object:
        """Undo the last token of each stream, once, so that it can be fed again.

        For a forward whose result was lost after its commit, or that ran ahead. Exact, because the token
        overwrote a key that was out of its own window; but not after another single token that failed, because
        that one has overwritten one key more. `rewindable` tells which it is. `step_on` takes what is returned,
        and undoes this.
        """
        before = self._state
        t, unfinished, rows = before
        self._state = [max(0, count - 1) for count in t], unfinished, rows.written(t, 0)
        return before, self._state

    def step_on(self, back: object) -> bool:
        """Undo the `step_back` that returned `back`, if the cache was not used since. Returns whether it did."""
        assert isinstance(back, tuple)
        before, after = back
        if self._state is not after:
            return False
        self._state = before
        return True

    def finish_commit(self) -> None:
        """Complete a commit or an eviction that was interrupted."""
        t, unfinished, rows = self._state
        for store in unfinished:
            store.commit()
        self._state = t, (), rows  # also where nothing was left: `step_on` then knows that the cache was used

    # Taking entries out

    def evict_range(self, start: int, stop: int, rows: Sequence[int] | Tensor | None = None) -> None:
        """Take the entries `start` … `stop` - 1 out of the streams in `rows` (None: all), and close up the rest.

        Entries count from 0, the first sink; `held` tells how many there are. `seen` does not change.

        Nothing stored is touched where the range begins right behind the sinks, or ends with the newest entry.
        Otherwise the entries on the shorter side of the gap move: their keys are rotated by the length of the gap,
        and rounded once more, by an int8 cache to 8 bits. Until this returns, it needs memory for a copy of them.

        Raises ValueError, and changes nothing, for a range that touches the sinks or ends behind the newest entry
        of one of these rows.
        """
        numbers = row_numbers(rows, self.batch_size)
        check_range(start, stop, self.sinks)
        self.finish_commit()
        held = self.held.tolist()
        check_up_to(stop, {number: held[number] for number in numbers})
        self._evict(dict.fromkeys(numbers, (start, stop)))

    def evict_for_space(self, n: int, rows: Sequence[int] | Tensor | None = None) -> None:
        """Take the oldest recent entries out until `n` more fit beside what is left, in `rows` (None: all).

        At most S + W - n entries stay, where W is the longest window of a layer. Nothing stored is touched. Raises
        ValueError for n outside 0 … W.
        """
        numbers, window = (
            row_numbers(rows, self.batch_size),
            max(layout.window for layout in self._rows.layouts),
        )
        check_room(n, window)
        self.finish_commit()
        held = self.held.tolist()
        self._evict({number: (self.sinks, held[number] + n - window) for number in numbers})

    def rewind(self, n: int, rows: Sequence[int] | Tensor | None = None) -> None:
        """Take the newest `n` tokens of the streams in `rows` (None: all) back, as if they had not been fed.

        `rewindable` tells how many can be taken back: all while nothing was pushed out of the window, and then only
        the last one, because the others have overwritten what they pushed out. `evict_range(held - n, held)` takes
        any number of the newest entries out; what they pushed out stays out.

        Raises ValueError, and changes nothing, where one of the rows cannot go back so far.
        """
        numbers = row_numbers(rows, self.batch_size)
        check_at_least(0, n=n)
        self.finish_commit()
        limits = self.rewindable.tolist()
        check_rewind(n, {number: limits[number] for number in numbers})
        t, changed = self._written_rows().rewound(self._t, numbers, n)
        self._state = t, (), changed

    def _evict(self, ranges: Mapping[int, tuple[int, int]]) -> None:
        t, rows, moves = self._written_rows().evicted(self._t, ranges)
        moved = []
        for shifts, numbers in moves.items():
            of_list = dict(zip(self._layouts, shifts, strict=True))
            for own, ring in self._rings:
                if of_list[own].first < of_list[own].stop:
                    turn = partial(self._turned, of_list[own].by)
                    moved.append(MovedEntries(ring, self._layouts[own], numbers, of_list[own], turn))
        self._state = t, moved, rows
        self.finish_commit()

    def _turned(self, by: int, keys: Tensor) -> Tensor:
        return keys if self._rope is None else moved_keys(self._rope, keys, by, self.sinks + self.window)

    def _written_rows(self) -> Rows:
        """The rows, in which a single token that was begun counts as written."""
        return self._rows.written(self._t, 1) if self._begun is self._t else self._rows

    # Copies

    def copy(self) -> Self:
        """A cache of its own that goes on from the same state."""
        self.finish_commit()
        return deepcopy(self)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of `state_dict`, for `restore`: as large as the cache, on its device."""
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Return to a `snapshot`, which can be used again. Raises ValueError as `load_state_dict`."""
        self.load_state_dict(snapshot)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the streams, and the keys and values of each layer as they are stored, not copied.

        It is the state of a cache, not of a `Stream`: that one also keeps the tokens that the cache has not taken in,
        and what was shown of them. A new Stream around a loaded cache would begin with another BOS and without them.

        "version" int64 [1]; "sizes" int64 [3] (sinks, window, origin); "seen" int64 [B]; "rows" int64 [B, …], what
        was taken out of each row (see state.py).
        """
        self.finish_commit()
        sizes = torch.tensor([self.sinks, self.window, self.origin], dtype=torch.int64, device="cpu")
        rows = self._written_rows().rows
        state = {
            "version": torch.tensor([STATE_VERSION], dtype=torch.int64, device="cpu"),
            "sizes": sizes,
            "seen": self.seen,
            "rows": state_of_rows(rows),
        }
        for layer, (_, ring) in enumerate(self._rings):
            state |= {f"layers.{layer}.{name}": tensor for name, tensor in ring.tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another cache with the same model, sizes, batch, origin and quantize; copies.

        Raises ValueError, and changes nothing, where the state does not fit. A state without "version" is of a
        cache from which nothing was taken out.
        """
        with self.guard:
            own = self.state_dict()
            check_state(own, state, self.quantize)
            layouts = self._rows.layouts
            t, rows = rows_of_state(state, layouts)
            fresh = Rows.fresh(self.batch_size, layouts)
            self._state = [0] * self.batch_size, (), fresh  # an interrupted copy leaves empty streams
            for tensor, given in ((own[name], state[name]) for name in own if name.startswith("layers.")):
                tensor.copy_(given)
            self._state = t, (), Rows(rows, layouts)
