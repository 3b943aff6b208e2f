"""SinkCache: the keys and values of an endless stream, in constant memory.

Attention sinks and a window of recent tokens, after Xiao et al., Efficient Streaming Language Models with
Attention Sinks (arXiv 2309.17453). The authors' code evicts after the forward, so its `start_size=4,
recent_size=2000` is `sinks=4, window=2001` here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from streamllm.cache.checks import (
    check_at_least,
    check_range,
    check_rewind,
    check_room,
    check_up_to,
    row_numbers,
)
from streamllm.cache.entries import MovedEntries, Row, Rows
from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.ring import (
    LayerStore,
    Layout,
    Ring,
    TokenKind,
    Writes,
    plan_chunk,
    plan_ragged_chunk,
    plan_token,
    token_kind,
)
from streamllm.cache.state import STATE_VERSION, check_state, rows_of_state, state_of_rows
from streamllm.malloc import trim_heap
from streamllm.models.rotary import moved_keys
from streamllm.models.step import Plan, Step, geometry_of

RINGS: dict[str | None, type[Ring] | type[Int8Ring]] = {None: Ring, "int8": Int8Ring}
DEFAULT_WINDOW = 1020
MAX_ORIGIN = 1 << 48  # rotary angles are exact up to place 2^49, so a stream can run 2^48 tokens from here
TRIM_AFTER_TOKENS = 64  # a chunk of so many leaves freed memory with the allocator that is worth trimming

TokenKinds = Mapping["int | None", TokenKind]  # by the layers' own window


class SinkCache:
    """A rolling cache of `batch_size` streams: a token sees the first `sinks` tokens and the last `window`.

    The window counts the token itself. `sinks=0` is plain window attention; a window as long as the text is
    dense attention. `window=None` takes 1020, or what fits into the model's trained length beside the sinks.
    A forward of many tokens is computed in chunks of at most `chunk`, with the same result as one by one.
    `origin` is the place of the first token in the text; no result depends on it.

    Hand the cache to the model's forward, which advances it: `model(tokens, cache)`. Its tensors have the
    model's type and device: keys and values [B, G, S + W, D] for each layer (S + w where the layer's own
    sliding window w is shorter than W).

    quantize="int8" stores recent keys and values in 8 bits. Each key and each value [D] is rounded once, when it
    arrives (a key after its rotation), to int8 numbers times a scale of its own. The sinks stay exact. The
    recent tokens of a chunk are rounded before its queries meet them, so the result does not depend on how a
    text is cut into chunks. It depends slightly on `origin`, because keys are rounded after their rotation.
    A layer's keys and values are dequantised only while it attends to them.

    The cache is a list of at most S + W entries in the order of the text, the sinks first, and a query's positions
    are ranks in that list. `evict_range` and `evict_for_space` take entries out: keys and values of the others stay
    as they were computed, and the list closes up. New tokens fill the room before anything else leaves.

    Where the layers' own windows differ, each distinct window has a list of its own. The number of an entry counts
    in the longest list. What is taken out of it leaves the shorter lists, too, as far as they still hold it, and
    each list then fills again with new tokens. Entries that a short list has pushed out do not come back.

    Raises ValueError for sinks < 0, window < 1, batch_size < 1, chunk < 1, origin outside 0 … 2^48 or an unknown
    quantize. Warns when sinks + window is longer than the model's trained length.
    """

    def __init__(
        self,
        model: nn.Module,
        sinks: int = 4,
        window: int | None = None,
        batch_size: int = 1,
        chunk: int = 512,
        origin: int = 0,
        quantize: str | None = None,
    ) -> None:
        geometry = geometry_of(model)
        trained = geometry.trained_length
        check_at_least(0, sinks=sinks)
        if window is None:
            window = DEFAULT_WINDOW if trained is None else min(DEFAULT_WINDOW, trained - sinks)
            if window < 1:
                raise ValueError(
                    f"{sinks} sinks leave no room for a window: the model was trained for {trained} tokens; "
                    f"give fewer sinks, or a window"
                )
        check_at_least(1, window=window, batch_size=batch_size, chunk=chunk)
        check_at_least(0, origin=origin)
        if origin >= MAX_ORIGIN:
            raise ValueError(
                f"origin must be below {MAX_ORIGIN} (2^48), so that rotary angles stay exact, not {origin}"
            )
        if quantize not in tuple(RINGS):
            raise ValueError(f'quantize must be None or "int8", not {quantize!r}')
        if trained is not None and sinks + window > trained:
            warnings.warn(
                f"sinks + window = {sinks + window} is longer than the {trained} tokens "
                f"the model was trained for: expect it to break; "
                f"give window={max(1, trained - sinks)} or less",
                stacklevel=2,
            )
        self.sinks, self.window, self.origin = sinks, window, origin
        self.batch_size, self.chunk, self.quantize = batch_size, chunk, quantize
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self._trim = False  # whether a chunk of many tokens has come since the heap was trimmed
        # A layer whose own window w is shorter keeps min(W, w). One plan per distinct window.
        self._layouts = {
            own: Layout(sinks, window if own is None else min(window, own))
            for own in dict.fromkeys(geometry.windows)
        }
        fresh = Rows.fresh(batch_size, tuple(self._layouts.values()))
        # t of each row, what an unfinished commit has still to store, and what was taken out of each row. One
        # attribute, replaced as a whole: an interrupt cannot split them.
        self._state: tuple[list[int], Sequence[LayerStore | MovedEntries], Rows] = (
            [0] * batch_size,
            (),
            fresh,
        )
        self._begun: list[int] | None = None  # the t of each row for which a single token was last begun
        self._rope = geometry.rope
        self._written = fresh.starts  # what `starts` holds
        shape = batch_size, geometry.kv_heads, geometry.head_dim
        with torch.inference_mode(False):  # or only forwards in inference mode could write to them
            self._starts = torch.full((len(fresh.starts), batch_size), sinks, device=self.device)
            self._rings = [
                (own, RINGS[quantize](shape, self._layouts[own], self.dtype, self.device))
                for own in geometry.windows
            ]

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
        return torch.tensor(self._rows.seen(self._t), dtype=torch.int64)

    @property
    def held(self) -> Tensor:
        """How many entries each stream holds, sinks included: int64 [B], on the CPU. At most sinks + window.

        A single token that failed, or was undone, has already pushed out the entry that it pushes out.
        """
        return torch.tensor(self._written_rows().held(self._t), dtype=torch.int64)

    @property
    def rewindable(self) -> Tensor:
        """How many of its newest tokens each stream can `rewind`: int64 [B], on the CPU."""
        return torch.tensor(self._written_rows().rewindable(self._t), dtype=torch.int64)

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
        overwrote a key that was out of its own window. `step_on` takes what is returned, and undoes this.
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

    def copy(self) -> SinkCache:
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

        "version" int64 [1]; "sizes" int64 [3] (sinks, window, origin); "seen" int64 [B]; "rows" int64 [B, …], what
        was taken out of each row (see state.py).
        """
        self.finish_commit()
        sizes = torch.tensor([self.sinks, self.window, self.origin], dtype=torch.int64)
        rows = self._written_rows().rows
        state = {
            "version": torch.tensor([STATE_VERSION]),
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
        own = self.state_dict()
        check_state(own, state, self.quantize)
        layouts = self._rows.layouts
        t, rows = rows_of_state(state, layouts)
        fresh = Rows.fresh(self.batch_size, layouts)
        self._state = [0] * self.batch_size, (), fresh  # an interrupted copy leaves empty streams
        for tensor, given in ((own[name], state[name]) for name in own if name.startswith("layers.")):
            tensor.copy_(given)
        self._state = t, (), Rows(rows, layouts)

    def __repr__(self) -> str:
        counts = self.seen.tolist()
        seen = counts[0] if len(set(counts)) == 1 else counts
        return (
            f"SinkCache(sinks={self.sinks}, window={self.window}, batch_size={self.batch_size}, "
            f"chunk={self.chunk}, seen={seen}, {self.nbytes / 1e6:.1f} MB of {self.quantize or self.dtype} "
            f"on {self.device})"
        )

    # The contract of a forward (models/step.py: Cache)

    def plan(self, length: int, lengths: Sequence[int] | None = None) -> SinkPlan:
        """Where `length` new tokens per row stand; `lengths` [B] of them are real. No row advances."""
        self.finish_commit()
        if length == 1 and (lengths is None or all(lengths)):
            self._begin_token()
            return self.plan_token(self._places(), self.token_kinds())
        origin, t, device = self.origin, self._t, self.device
        lists = zip(self._layouts.items(), self._rows.starts, strict=True)
        if lengths is None and self._in_lockstep:
            planned = {
                own: plan_chunk(layout, origin, t[0], starts[0], length, device)
                for (own, layout), starts in lists
            }
        else:
            counts = [length] * self.batch_size if lengths is None else list(lengths)
            planned = {
                own: plan_ragged_chunk(layout, origin, t, starts, counts, length, device)
                for (own, layout), starts in lists
            }
        return self._plan(planned, [length] * self.batch_size if lengths is None else list(lengths))

    def commit(self, plan: Plan) -> None:
        """Store what the forward computed, and advance.

        The chunk counts as seen before it is stored. Where an interrupt or a lack of memory cuts the storing
        off, the next use of the cache completes it.
        """
        assert isinstance(plan, SinkPlan)
        chunked = any(store.writes.on_commit is not None for store in plan.stores)
        t, _, rows = self._state
        advanced = [t + count for t, count in zip(t, plan.advance, strict=True)]
        if 0 in plan.advance:  # such a row keeps what a single token that failed has overwritten
            rows = self._written_rows()
        self._state = advanced, plan.stores if chunked else (), rows
        self.finish_commit()
        self._trim_after(max(plan.advance) if chunked else 1)

    def _trim_after(self, tokens: int) -> None:
        """Trim the heap at the first single token after a long chunk, not after each chunk."""
        if tokens > 1:
            self._trim |= tokens >= TRIM_AFTER_TOKENS
        elif self._trim and self.device.type == "cpu":
            self._trim = False
            trim_heap()  # a stream may run for days beside what its prompt needed once

    def finish_commit(self) -> None:
        """Complete a commit that was interrupted."""
        t, unfinished, rows = self._state
        for store in unfinished:
            store.commit()
        self._state = t, (), rows  # also where nothing was left: `step_on` then knows that the cache was used

    # One token from its place: what a compiled step records (compiled/)

    @property
    def recording_key(self) -> object:
        """What distinguishes caches of one model whose steps cannot share a recording. Hashable."""
        sizes = self.sinks, self.window, self.batch_size  # rope may depend on S + W where layers keep less
        return (*self._layouts.items(), *sizes, self.quantize, self.dtype, self.device)

    def write_places(self, places: Tensor) -> None:
        """Write t of the next token of each row to `places`, int64 [R] on the cache's device, and begin it."""
        self._begin_token()
        if len(places) == 1:
            places.fill_(self._t[0])
        else:
            places.copy_(self._places(), non_blocking=True)

    def commit_token(self) -> None:
        """Advance each row by the token that a recorded step has stored."""
        t, _, rows = self._state
        self._state = [t + 1 for t in t], (), rows
        self._trim_after(1)

    @property
    def starts(self) -> Tensor:
        """int64 [distinct windows, B] on the device: the first place behind the sinks in each list of each row.

        The tensor stays the same; `write_places` writes it anew after an eviction.
        """
        return self._starts

    def _begin_token(self) -> None:
        self._begun = self._t
        if self._written is not self._rows.starts:
            if self._written != self._rows.starts:
                self._starts.copy_(torch.tensor(self._rows.starts, dtype=torch.int64))
            self._written = self._rows.starts

    @property
    def _in_lockstep(self) -> bool:
        """Whether all rows stand at the same place and have the same starts."""
        return len(set(self._t)) == 1 and self._rows.agree

    def _places(self) -> Tensor:
        """t of the next token of each row, on the cache's device: int64 [1] where all rows agree, else [B]."""
        t = self._t[:1] if self._in_lockstep else self._t
        on_cuda = self.device.type == "cuda"  # pinned, or the copy would wait for all queued work
        places = torch.tensor(t, dtype=torch.int64, device="cpu", pin_memory=on_cuda)
        return places.to(self.device, non_blocking=True)

    def token_kinds(self, recorded: bool = False, for_any_place: bool = False) -> TokenKinds:
        """All that the next token's kernels depend on, besides its places and the cache's sizes.

        recorded: in few kinds. for_any_place: in fewer, each of which serves a full window, too.
        """
        rows, lockstep = self._rows, self._in_lockstep
        return {
            own: token_kind(
                layout,
                self.origin,
                self._t,
                starts if rows.with_gap else None,
                lockstep,
                recorded,
                for_any_place,
            )
            for (own, layout), starts in zip(self._layouts.items(), rows.starts, strict=True)
        }

    def plan_token(self, places: Tensor, kinds: TokenKinds, origin: Tensor | None = None) -> SinkPlan:
        """The plan of one token per row from its places int64 [R], whose values are not read here.

        origin int64 [1]: the cache's origin as a tensor; then the plan serves caches of any origin.
        """
        start = self.origin if origin is None else origin
        planned = {
            own: plan_token(self._layouts[own], start, kind, places, starts[: len(places)])
            for (own, kind), starts in zip(kinds.items(), self._starts, strict=True)
        }
        return self._plan(planned, [1] * self.batch_size)

    def _plan(self, planned: Mapping[int | None, tuple[Step, Writes]], advance: list[int]) -> SinkPlan:
        stores = [LayerStore(ring, planned[own][1]) for own, ring in self._rings]
        # Frequencies that depend on a length depend on the cache's, also where a layer's window is shorter.
        slots = self.sinks + self.window
        steps = {
            own: step if step.rope_length == slots else replace(step, rope_length=slots)
            for own, (step, _) in planned.items()
        }
        return SinkPlan(steps, stores, advance)


@dataclass(frozen=True, eq=False)
class SinkPlan(Plan):
    """The plan of a forward with a SinkCache."""

    stores: Sequence[LayerStore]
    advance: list[int]  # how many tokens each row takes in
