"""SinkCache: the keys and values of an endless stream, in constant memory.

Attention sinks and a window of recent tokens, after Xiao et al., Efficient Streaming Language Models with
Attention Sinks (arXiv 2309.17453). The authors' code evicts after the forward, so its `start_size=4,
recent_size=2000` is `sinks=4, window=2001` here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamllm.cache.checks import check_same_sizes
from streamllm.cache.ring import (
    LayerStore,
    Layout,
    Writes,
    plan_chunk,
    plan_ragged_chunk,
    plan_token,
)
from streamllm.cache.streams import RINGS, Streams
from streamllm.cache.token_kinds import TokenKind, token_kind
from streamllm.malloc import trim_heap
from streamllm.models.checks import whole_number
from streamllm.models.step import Geometry, Plan, Step, geometry_of

DEFAULT_WINDOW = 1020
CHUNK, CUDA_CHUNK = 512, 4096  # tokens per forward, by default
MAX_ORIGIN = 1 << 48  # rotary angles are exact up to place 2^49, so a stream can run 2^48 tokens from here
TRIM_AFTER_TOKENS = 64  # a chunk of so many leaves freed memory with the allocator that is worth trimming

TokenKinds = Mapping["int | None", TokenKind]  # by the layers' own window


class SinkCache(Streams):
    """A rolling cache of `batch_size` streams: a token sees the first `sinks` tokens and the last `window`.

    The window counts the token itself. `sinks=0` is plain window attention; a window as long as the text is
    dense attention. `window=None` takes 1020, or what fits into the model's trained length beside the sinks.
    A forward of many tokens is computed in chunks of at most `chunk`, with the same result as one by one. None: 512,
    on CUDA 4096 divided by the batch where that is more.
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
        chunk: int | None = None,
        origin: int = 0,
        quantize: str | None = None,
    ) -> None:
        geometry = geometry_of(model)
        trained = geometry.trained_length
        sinks = whole_number("sinks", sinks, 0)
        if window is None:
            window = DEFAULT_WINDOW if trained is None else min(DEFAULT_WINDOW, trained - sinks)
            if window < 1:
                raise ValueError(
                    f"{sinks} sinks leave no room for a window: the model was trained for {trained} tokens; "
                    f"give fewer sinks, or a window"
                )
        window = whole_number("window", window, 1)
        batch_size = whole_number("batch_size", batch_size, 1)
        if chunk is None:
            on_cuda = next(model.parameters()).device.type == "cuda"
            chunk = max(CHUNK, CUDA_CHUNK // batch_size) if on_cuda else CHUNK
        chunk, origin = whole_number("chunk", chunk, 1), whole_number("origin", origin, 0)
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
        self.chunk = chunk
        weight = next(model.parameters())
        self.dtype, self.device, self.geometry = weight.dtype, weight.device, geometry
        self._has_autocast = torch.amp.is_autocast_available(weight.device.type)
        self._trim = False  # whether a chunk of many tokens has come since the heap was trimmed
        # A layer whose own window w is shorter keeps min(W, w). One plan per distinct window.
        layouts = {
            own: Layout(sinks, window if own is None else min(window, own))
            for own in dict.fromkeys(geometry.windows)
        }
        shape = batch_size, geometry.kv_heads, geometry.head_dim
        with torch.inference_mode(False):  # or only forwards in inference mode could write to them
            self._starts = torch.full(
                (len(layouts), batch_size), sinks, dtype=torch.int64, device=self.device
            )
            rings = [
                (own, RINGS[quantize](shape, layouts[own], self.dtype, self.device))
                for own in geometry.windows
            ]
        super().__init__(layouts, rings, sinks, window, batch_size, origin, quantize, geometry.rope)
        self._written = self._rows.starts  # what `starts` holds

    def __repr__(self) -> str:
        counts = self.seen_counts
        seen = counts[0] if len(set(counts)) == 1 else counts
        return (
            f"SinkCache(sinks={self.sinks}, window={self.window}, batch_size={self.batch_size}, "
            f"chunk={self.chunk}, seen={seen}, {self.nbytes / 1e6:.1f} MB of {self.quantize or self.dtype} "
            f"on {self.device})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy.deepcopy and pickle. A copy that is made in inference mode can be used outside, too."""
        self.__dict__.update(state)
        with torch.inference_mode(False):
            if self._starts.is_inference():
                self._starts = self._starts.clone()
            for _, ring in self._rings:
                for name, tensor in vars(ring).items():
                    if isinstance(tensor, Tensor) and tensor.is_inference():
                        setattr(ring, name, tensor.clone())

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


@dataclass(frozen=True, eq=False)
class SinkPlan(Plan):
    """The plan of a forward with a SinkCache."""

    stores: Sequence[LayerStore]
    advance: list[int]  # how many tokens each row takes in
