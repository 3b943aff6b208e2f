"""RollingCache: what a forward asks of a cache. Its rings, the plan of the next tokens, and how rows advance."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamllm.cache.checks import check_same_sizes
from streamllm.cache.chunks import plan_chunk, plan_ragged_chunk
from streamllm.cache.entries import MovedEntries, Rows
from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.memory import check_fits
from streamllm.cache.ring import LayerStore, Layout, Ring, TokenKind, Writes, plan_token, token_kind
from streamllm.malloc import trim_heap
from streamllm.models.step import Geometry, Plan, Step

RINGS: dict[str | None, type[Ring] | type[Int8Ring]] = {None: Ring, "int8": Int8Ring}
TRIM_AFTER_TOKENS = 64  # a chunk of so many leaves freed memory with the allocator that is worth trimming

TokenKinds = Mapping["int | None", TokenKind]  # by the layers' own window


class RollingCache:
    """The base of `SinkCache`: the rings, which entries each row holds in them, and the contract of a forward."""

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        device: torch.device,
        sinks: int,
        window: int,
        batch_size: int,
        chunk: int,
        origin: int,
        quantize: str | None,
    ) -> None:
        """The arguments are right already; see `SinkCache`."""
        self.geometry, self.dtype, self.device = geometry, dtype, device
        self.sinks, self.window, self.batch_size = sinks, window, batch_size
        self.chunk, self.origin, self.quantize = chunk, origin, quantize
        # A layer whose own window w is shorter keeps min(W, w). One plan per distinct window.
        self._layouts = {
            own: Layout(sinks, window if own is None else min(window, own))
            for own in dict.fromkeys(geometry.windows)
        }
        with torch.inference_mode(False):  # or only forwards in inference mode could write to them
            self._starts = torch.full(
                (len(self._layouts), batch_size), sinks, dtype=torch.int64, device=device
            )
            self._rings = self._new_rings(batch_size)
        self.guard = ForwardGuard()
        self._has_autocast = torch.amp.is_autocast_available(device.type)
        self._trim = False  # whether a chunk of many tokens has come since the heap was trimmed
        fresh = Rows.fresh(batch_size, tuple(self._layouts.values()))
        # t of each row, what an unfinished commit has still to store, and what was taken out of each row. One
        # attribute, replaced as a whole: an interrupt cannot split them.
        self._state: tuple[list[int], Sequence[LayerStore | MovedEntries], Rows] = (
            [0] * batch_size,
            (),
            fresh,
        )
        self._begun: list[int] | None = None  # the t of each row for which a single token was last begun
        self._written = fresh.starts  # what `starts` holds

    def _new_rings(self, batch_size: int) -> list[tuple[int | None, Ring | Int8Ring]]:
        """The rings of all layers, filled with zeros. Raises MemoryError where they would not fit when full."""
        geometry, make = self.geometry, RINGS[self.quantize]
        shape = batch_size, geometry.kv_heads, geometry.head_dim

        def ring(own: int | None, device: torch.device) -> Ring | Int8Ring:
            return make(shape, self._layouts[own], self.dtype, device)

        # A ring without memory tells how much it takes.
        sizes = {own: ring(own, torch.device("meta")) for own in self._layouts}
        nbytes = sum(tensor.nbytes for own in geometry.windows for tensor in sizes[own].tensors.values())
        check_fits(self.sinks, self.window, batch_size, nbytes, self.device)
        return [(own, ring(own, self.device)) for own in geometry.windows]

    @property
    def _t(self) -> list[int]:
        """The place of each row's next token, without the origin."""
        return self._state[0]

    @property
    def _rows(self) -> Rows:
        return self._state[2]

    # The contract of a forward (models/step.py: Cache)

    def check_model(self, geometry: Geometry, device: torch.device) -> None:
        """Raises ValueError where the cache was made for another model, or autocast would change its type."""
        if geometry is not self.geometry:
            check_same_sizes(self.geometry, geometry)
        if device != self.device:
            raise ValueError(
                f"the cache is on {self.device} and the model on {device}: make a SinkCache for the model as it is"
            )
        if self._has_autocast and torch.is_autocast_enabled(self.device.type):
            raise ValueError(
                "autocast is on, and a stream computes in the type of its cache: leave autocast off, and load the "
                "model with dtype=torch.bfloat16 for that type"
            )

    def plan(self, length: int, lengths: Sequence[int] | None = None) -> SinkPlan:
        """Where `length` new tokens per row stand; `lengths` [B] of them are real. No row advances."""
        self.finish_commit()
        if length == 1 and (lengths is None or all(lengths)):
            self._begin_token()
            return self.plan_token(self._places(), self.token_kinds())
        return self._plan_chunk(length, lengths)

    def _plan_chunk(self, length: int, lengths: Sequence[int] | None) -> SinkPlan:
        origin, t, device = self.origin, self._t, self.device
        lists = zip(self._layouts.items(), self._rows.starts, strict=True)
        sinks_differ = self.quantize is not None
        if lengths is None and self._in_lockstep:
            planned = {
                own: plan_chunk(layout, origin, t[0], starts[0], length, device, sinks_differ)
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

    # One token from its place: what a compiled step records (compiled/)

    @property
    def recording_key(self) -> object:
        """What distinguishes caches of one model whose steps cannot share a recording. Hashable."""
        sizes = self.sinks, self.window, self.batch_size  # rope may depend on S + W where layers keep less
        return (*self._layouts.items(), *sizes, self.quantize, self.dtype, self.device)

    def _slots_of(self, window: int | None) -> int:
        """How many slots the rings of layers with this window of their own have."""
        return self._layouts[window].slots

    def _list_of(self, ring: object) -> int:
        """The number of a layer's list of entries: its row in `starts`."""
        own = next(own for own, other in self._rings if other is ring)
        return list(self._layouts).index(own)

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

    @property
    def has_gap(self) -> bool:
        """Whether the next token of some row finds room behind its sinks: entries were taken out, and are not yet
        replaced. Without a gap, what a token sees depends on its place alone.
        """
        rows = self._rows
        return rows.with_gap and any(
            start > self.sinks and t + 1 - start < layout.window
            for layout, starts in zip(rows.layouts, rows.starts, strict=True)
            for start, t in zip(starts, self._t, strict=True)
        )

    def _begin_token(self) -> None:
        self._begun = self._t
        if self._written is not self._rows.starts:
            if self._written != self._rows.starts:
                self._starts.copy_(torch.tensor(self._rows.starts, dtype=torch.int64, device="cpu"))
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

    def finish_commit(self) -> None:
        """Complete a commit or an eviction that was interrupted."""
        t, unfinished, rows = self._state
        for store in unfinished:
            store.commit()
        self._state = t, (), rows  # also where nothing was left: `step_on` then knows that the cache was used

    def _written_rows(self) -> Rows:
        """The rows, in which a single token that was begun counts as written."""
        return self._rows.written(self._t, 1) if self._begun is self._t else self._rows


@dataclass(frozen=True, eq=False)
class SinkPlan(Plan):
    """The plan of a forward with a SinkCache."""

    stores: Sequence[LayerStore]
    advance: list[int]  # how many tokens each row takes in


class ForwardGuard:
    """`with guard:` around whatever reads and then advances a cache. Raises RuntimeError in a second thread.

    It holds the number of the thread, not a lock: a thread that was interrupted in between can go on, and one that
    has ended keeps nothing.
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # torch.compile cannot trace threads
            return
        own = threading.get_ident()
        holder = self._holder.setdefault("thread", own)  # in one operation: tests and sets
        if holder != own:
            self._take_over(holder, own)

    def _take_over(self, holder: int, own: int) -> None:
        """From a thread that has ended without leaving."""
        if holder in sys._current_frames():
            raise RuntimeError(
                "another thread is using this cache: run one forward at a time on it, or give each thread a cache "
                "of its own"
            )
        self._holder["thread"] = own

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._holder.pop("thread", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: nothing uses a copy yet."""
        return {"_holder": {}}
