"""SinkCache: the keys and values of an endless stream, in constant memory.

Attention sinks and a window of recent tokens, after Xiao et al., Efficient Streaming Language Models with
Attention Sinks (arXiv 2309.17453). The authors' code evicts after the forward, so its `start_size=4,
recent_size=2000` is `sinks=4, window=2001` here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

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
from streamllm.cache.rolling_cache import RINGS, RollingCache
from streamllm.cache.state import (
    SLOT_AXIS,
    STATE_VERSION,
    check_state,
    check_stored,
    rows_of_state,
    slots_written,
    state_of_rows,
)
from streamllm.models.checks import whole_number
from streamllm.models.rotary import moved_keys
from streamllm.models.step import geometry_of

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_WINDOW = 4092
CHUNK, CUDA_CHUNK = 512, 4096  # tokens per forward, by default
MAX_ORIGIN = 1 << 48  # rotary angles are exact up to place 2^49, so a stream can run 2^48 tokens from here


class SinkCache(RollingCache):
    """A rolling cache of `batch_size` streams: a token sees the first `sinks` tokens and the last `window`.

    The window counts the token itself. `sinks=0` is plain window attention; a window as long as the text is
    dense attention. `window=None` takes 4092, or what fits into the model's trained length beside the sinks.
    A forward of many tokens is computed in chunks of at most `chunk`, with the same result as one by one. None: 512,
    on CUDA 4096 divided by the batch where that is more.
    `origin` is the place of the first token in the text; no result depends on it.

    Hand the cache to the model's forward, which advances it: `model(tokens, cache)`. Its tensors have the
    model's type and device: keys and values [B, G, S + W, D] for each layer (S + w where the layer's own
    sliding window w is shorter than W). On a CPU they take memory as they fill.

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
    quantize, and MemoryError where the device cannot hold the cache when it is full. Warns when sinks + window is
    longer than the model's trained length.
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
        weight = next(model.parameters())
        super().__init__(
            geometry, weight.dtype, weight.device, sinks, window, batch_size, chunk, origin, quantize
        )

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
        """Bytes of keys and values when the window is full. On a CPU a shorter stream takes less."""
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
        rope = self.geometry.rope
        return keys if rope is None else moved_keys(rope, keys, by, self.sinks + self.window)

    # Copies

    def copy(self) -> Self:
        """A cache of its own that goes on from the same state."""
        self.finish_commit()
        rings = [ring for _, ring in self._rings]
        with torch.inference_mode(False):
            new = self._new_rings(self.batch_size)
        made = deepcopy(self, dict(zip(map(id, rings), (ring for _, ring in new), strict=True)))
        made.load_state_dict(self.state_dict())
        return made

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of `state_dict`, for `restore`: as large as the cache, on its device."""
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Return to a `snapshot`, which can be used again. Raises ValueError as `load_state_dict`."""
        self.load_state_dict(snapshot)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the streams, and the keys and values of each layer as they are stored, not copied.

        Of keys and values it has the slots that the streams have used so far, so a short stream has a short state.
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
        return state | self._stored(slots_written(rows, self._t))

    def _stored(self, slots: int | None = None) -> dict[str, Tensor]:
        """The tensors of all rings by name: all, or what the first so many slots take."""
        return {
            f"layers.{layer}.{name}": tensor
            for layer, (_, ring) in enumerate(self._rings)
            for name, tensor in (ring.tensors if slots is None else ring.first(slots)).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another cache with the same model, sizes, batch, origin and quantize; copies.

        Raises ValueError, and changes nothing, where the state does not fit. A state without "version" is of a
        cache from which nothing was taken out.
        """
        with self.guard:
            own, stored = self.state_dict(), self._stored()
            check_state(own | stored, state, self.quantize)
            layouts = self._rows.layouts
            t, rows = rows_of_state(state, layouts)
            used = self._stored(slots_written(rows, t))
            check_stored(used, state)
            fresh = Rows.fresh(self.batch_size, layouts)
            self._state = [0] * self.batch_size, (), fresh  # an interrupted copy leaves empty streams
            for name, tensor in stored.items():
                given, before = state[name], own[name].shape[SLOT_AXIS]
                count = given.shape[SLOT_AXIS]
                tensor.narrow(SLOT_AXIS, 0, count).copy_(given)
                if before > count:  # NaN or infinity must not stay: a masked value is multiplied by 0
                    tensor.narrow(SLOT_AXIS, count, before - count).zero_()
            self._state = t, (), Rows(rows, layouts)
