"""SinkCache: the keys and values of an endless stream, in constant memory.

Attention sinks and a window of recent tokens, after Xiao et al., Efficient Streaming Language Models with
Attention Sinks (arXiv 2309.17453). The authors' code evicts after the forward, so its `start_size=4,
recent_size=2000` is `sinks=4, window=2001` here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor, nn

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
from streamllm.cache.state import check_state
from streamllm.malloc import trim_heap
from streamllm.models.step import Plan, Step, geometry_of

RINGS: dict[str | None, type[Ring] | type[Int8Ring]] = {None: Ring, "int8": Int8Ring}
DEFAULT_WINDOW = 1020
MAX_ORIGIN = 1 << 48  # rotary angles are exact up to twice this place
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
        _check_at_least(0, sinks=sinks)
        if window is None:
            window = DEFAULT_WINDOW if trained is None else min(DEFAULT_WINDOW, trained - sinks)
            if window < 1:
                raise ValueError(
                    f"{sinks} sinks leave no room for a window: the model was trained for {trained} tokens; "
                    f"give fewer sinks, or a window"
                )
        _check_at_least(1, window=window, batch_size=batch_size, chunk=chunk)
        _check_at_least(0, origin=origin)
        if origin >= MAX_ORIGIN:
            raise ValueError(
                f"origin must be below {MAX_ORIGIN}, where angles stop being exact, not {origin}"
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
        # Tokens seen per row, and a commit that may be unfinished. One attribute, replaced as a whole: an
        # interrupt cannot split the two.
        self._state: tuple[list[int], SinkPlan | None] = ([0] * batch_size, None)
        self._trim = False  # whether a chunk of many tokens has come since the heap was trimmed
        # A layer whose own window w is shorter keeps min(W, w). One plan per distinct window.
        self._layouts = {
            own: Layout(sinks, window if own is None else min(window, own))
            for own in dict.fromkeys(geometry.windows)
        }
        shape = batch_size, geometry.kv_heads, geometry.head_dim
        with torch.inference_mode(False):  # or only forwards in inference mode could write to them
            self._rings = [
                (own, RINGS[quantize](shape, self._layouts[own], self.dtype, self.device))
                for own in geometry.windows
            ]

    @property
    def _seen(self) -> list[int]:
        return self._state[0]

    @property
    def seen(self) -> Tensor:
        """How many tokens each stream has taken in: int64 [B], on the CPU."""
        return torch.tensor(self._seen, dtype=torch.int64)

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
        chosen = _row_numbers(range(self.batch_size) if rows is None else rows, self.batch_size)
        if len(set(chosen)) < self.batch_size:
            self.finish_commit()
        seen = [0 if row in chosen else seen for row, seen in enumerate(self._seen)]
        self._state = seen, None
        for tensor in self.tensors():
            tensor[..., chosen, :, :, :] = 0

    def step_back(self) -> object:
        """Undo the last token of each stream, once, so that it can be fed again.

        For a forward whose result was lost after its commit, or that ran ahead. Exact, because the token
        overwrote a key that was out of its own window. `step_on` takes what is returned, and undoes this.
        """
        before = self._state
        self._state = [max(0, count - 1) for count in before[0]], before[1]
        return before, self._state

    def step_on(self, back: object) -> bool:
        """Undo the `step_back` that returned `back`, if the cache was not used since. Returns whether it did."""
        assert isinstance(back, tuple)
        before, after = back
        if self._state is not after:
            return False
        self._state = before
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the streams: "sizes" int64 [3] (sinks, window, origin), "seen" int64 [B], and the keys
        and values of each layer as they are stored, not copied.
        """
        self.finish_commit()
        sizes = torch.tensor([self.sinks, self.window, self.origin], dtype=torch.int64)
        state = {"sizes": sizes, "seen": self.seen}
        for layer, (_, ring) in enumerate(self._rings):
            state |= {f"layers.{layer}.{name}": tensor for name, tensor in ring.tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another cache with the same model, sizes, batch, origin and quantize; copies.

        Raises ValueError, and changes nothing, where the state does not fit.
        """
        own = self.state_dict()
        check_state(own, state, self.quantize)
        self._state = [0] * self.batch_size, None  # an interrupted copy leaves empty streams
        for tensor, given in ((own[name], state[name]) for name in own if name.startswith("layers.")):
            tensor.copy_(given)
        self._state = state["seen"].tolist(), None

    def __repr__(self) -> str:
        seen = self._seen[0] if len(set(self._seen)) == 1 else self._seen
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
            return self.plan_token(self._places(), self.token_kinds())
        origin, seen, device = self.origin, self._seen, self.device
        if lengths is None and len(set(seen)) == 1:
            planned = {
                own: plan_chunk(layout, origin, seen[0], length, device)
                for own, layout in self._layouts.items()
            }
        else:
            counts = [length] * self.batch_size if lengths is None else list(lengths)
            planned = {
                own: plan_ragged_chunk(layout, origin, seen, counts, length, device)
                for own, layout in self._layouts.items()
            }
        return self._plan(planned, [length] * self.batch_size if lengths is None else list(lengths))

    def commit(self, plan: Plan) -> None:
        """Store what the forward computed, and advance.

        The chunk counts as seen before it is stored. Where an interrupt or a lack of memory cuts the storing
        off, the next use of the cache completes it.
        """
        assert isinstance(plan, SinkPlan)
        chunked = any(store.writes.on_commit is not None for store in plan.stores)
        seen = [seen + count for seen, count in zip(self._seen, plan.advance, strict=True)]
        self._state = seen, plan if chunked else None
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
        seen, unfinished = self._state
        if unfinished is not None:
            for store in unfinished.stores:
                store.commit()
        self._state = seen, None  # also where nothing was left: `step_on` then knows that the cache was used

    # One token from its place: what a compiled step records (compiled/)

    @property
    def sizes(self) -> object:
        """What distinguishes caches of one model whose steps cannot share a recording. Hashable."""
        return (*self._layouts.items(), self.batch_size, self.quantize, self.dtype, self.device)

    def slots_of(self, window: int | None) -> int:
        """How many slots the rings of layers with this window of their own have."""
        return self._layouts[window].slots

    def write_places(self, places: Tensor) -> None:
        """Write t of the next token of each row to `places`, int64 [R] on the cache's device."""
        if len(places) == 1:
            places.fill_(self._seen[0])
        else:
            places.copy_(self._places(), non_blocking=True)

    def commit_token(self) -> None:
        """Advance each row by the token that a recorded step has stored."""
        self._state = [seen + 1 for seen in self._seen], None
        self._trim_after(1)

    def _places(self) -> Tensor:
        """t of the next token of each row, on the cache's device: int64 [1] where all rows agree, else [B]."""
        seen = self._seen[:1] if len(set(self._seen)) == 1 else self._seen
        on_cuda = self.device.type == "cuda"  # pinned, or the copy would wait for all queued work
        places = torch.tensor(seen, dtype=torch.int64, device="cpu", pin_memory=on_cuda)
        return places.to(self.device, non_blocking=True)

    def token_kinds(self, recorded: bool = False, for_any_place: bool = False) -> TokenKinds:
        """All that the next token's kernels depend on, besides its places and the cache's sizes.

        recorded: in few kinds. for_any_place: in fewer, each of which serves a full window, too.
        """
        return {
            own: token_kind(layout, self.origin, self._seen, recorded, for_any_place)
            for own, layout in self._layouts.items()
        }

    def plan_token(self, places: Tensor, kinds: TokenKinds, origin: Tensor | None = None) -> SinkPlan:
        """The plan of one token per row from its places int64 [R], whose values are not read here.

        origin int64 [1]: the cache's origin as a tensor; then the plan serves caches of any origin.
        """
        start = self.origin if origin is None else origin
        planned = {own: plan_token(self._layouts[own], start, kind, places) for own, kind in kinds.items()}
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


def _row_numbers(rows: Sequence[int] | Tensor, batch_size: int) -> list[int]:
    given = rows.tolist() if isinstance(rows, Tensor) else rows
    try:
        numbers = [-1 if isinstance(row, bool) else index(row) for row in given]
    except TypeError:
        numbers = [-1]
    if not all(0 <= number < batch_size for number in numbers):
        raise ValueError(f"rows must be a list of row numbers in 0 … {batch_size - 1}, not {given}")
    return numbers


def _check_at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
