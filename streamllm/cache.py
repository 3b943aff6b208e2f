"""SinkCache: the keys and values of a stream without end, in constant memory.

Attention sinks and a window of recent tokens, after Xiao et al., Efficient Streaming Language Models with
Attention Sinks (arXiv 2309.17453). `start_size=4, recent_size=2000` of the authors' code, which evicts after
the forward, is `sinks=4, window=2001` here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from streamllm.malloc import trim_heap
from streamllm.models.step import Band, Plan, Step, geometry_of

DEFAULT_WINDOW = 1020
# Slots: a ring that fills is met in steps of so many, because kernels are made anew for each size.
STRIDE = 256
MANY = 64  # tokens at once, whose forward leaves memory behind that is worth to be given back
FURTHEST = 1 << 48  # rotary angles are exact up to twice this place


class SinkCache:
    """A rolling cache of `batch_size` streams: a token sees the first `sinks` tokens and the last `window`.

    The window counts the token itself. `sinks=0` is plain window attention; a window as long as the text is
    dense attention. `window=None` takes 1020, or what fits into the model's trained length beside the sinks.
    A forward of many tokens is computed in chunks of at most `chunk`, with the same result as one by one.
    `origin` is the place of the first token in the text: no result depends on it.

    The cache is handed to the model's forward, which moves it on: `model(tokens, cache)`. Its tensors have
    the model's type and device, [B, G, S + W, D] for keys and for values of each layer (S + w where the
    layer's own sliding window w is shorter than W).

    quantize="int8" stores the recent tokens in 8 bits: each key and each value [D], once rotated, is rounded
    to whole numbers of its own scale when it arrives, and never again. The sinks stay exact. A chunk meets
    its own recent tokens rounded, too, so that the result does not depend on how a text is cut (it does a
    little on `origin`: keys are rounded as they stand there; and what lies in the middle between two numbers
    may fall to either side, as its last bit has it). Keys and values have the model's type again only while
    their layer looks at them.

    Raises ValueError for sinks < 0, window < 1, batch_size < 1, chunk < 1, origin outside 0 … 2^48 or a
    quantize that there is not. Warns when sinks + window is longer than the model was trained for.
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
        _at_least(0, sinks=sinks)
        if window is None:
            window = DEFAULT_WINDOW if trained is None else min(DEFAULT_WINDOW, trained - sinks)
            if window < 1:
                raise ValueError(
                    f"{sinks} sinks leave no room for a window: the model was trained for {trained} tokens; "
                    f"give fewer sinks, or a window"
                )
        _at_least(1, window=window, batch_size=batch_size, chunk=chunk)
        _at_least(0, origin=origin)
        if origin >= FURTHEST:
            raise ValueError(f"origin must be below {FURTHEST}, where angles end to be exact, not {origin}")
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
        # Tokens seen per row, and the plan that is counted there but that perhaps not every layer keeps yet.
        # One attribute, replaced as a whole by all that touches the cache: Ctrl-C falls before or after.
        self._stand: tuple[list[int], _SinkPlan | None] = ([0] * batch_size, None)
        self._prompted = False  # whether many tokens came at once, and no single one since
        # A layer whose own window w is shorter keeps W' = min(W, w). One plan per distinct window.
        self._windows = {own: window if own is None else min(window, own) for own in geometry.windows}
        shape = batch_size, geometry.kv_heads, geometry.head_dim
        with torch.inference_mode(False):  # or no forward outside of it could write to them
            self._rings = [
                (own, RINGS[quantize](shape, sinks, self._windows[own], self.dtype, self.device))
                for own in geometry.windows
            ]

    @property
    def _seen(self) -> list[int]:
        return self._stand[0]

    @property
    def seen(self) -> Tensor:
        """How many tokens each stream has taken in: int64 [B], on the CPU."""
        return torch.tensor(self._seen)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, from the first token to the last."""
        return sum(tensor.nbytes for tensor in self._stored())

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Forget the streams in `rows` (None: all), which start again from nothing.

        Raises ValueError for anything but row numbers: a mask of True and False is not a list of rows.
        """
        chosen = _row_numbers(range(self.batch_size) if rows is None else rows, self.batch_size)
        if len(set(chosen)) < self.batch_size:
            self._finish()
        seen = [0 if row in chosen else seen for row, seen in enumerate(self._seen)]
        self._stand = seen, None
        for _, ring in self._rings:
            for tensor in ring.tensors.values():
                tensor[..., chosen, :, :, :] = 0

    def step_back(self) -> object:
        """Take each stream back by the token that it took in last, once, so that it can be fed again.

        For a forward whose result was lost after it was committed, or that ran ahead. Exact: what that token
        overwrote was out of its own window. What is returned lets `step_on` undo it.
        """
        before = self._stand
        self._stand = [max(0, count - 1) for count in before[0]], before[1]
        return before, self._stand

    def step_on(self, back: object) -> bool:
        """Undo what `step_back` did and returned, if nothing has touched the cache since. Says whether it did."""
        assert isinstance(back, tuple)
        before, after = back
        if self._stand is not after:
            return False
        self._stand = before
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """All that the streams are: "sizes" int64 [3] (sinks, window, origin), "seen" int64 [B], and keys and
        values of each layer as they are stored, not copied.
        """
        self._finish()
        state = {"sizes": torch.tensor([self.sinks, self.window, self.origin]), "seen": self.seen}
        for layer, (_, ring) in enumerate(self._rings):
            state |= {f"layers.{layer}.{name}": tensor for name, tensor in ring.tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another cache of the same model, sizes, batch, origin and quantize stood; copies.

        Raises ValueError, and changes nothing, where the state is not one of such a cache.
        """
        own = self.state_dict()
        quantized = "int8" if "layers.0.scales" in state else None
        if quantized != self.quantize:
            raise ValueError(
                f"the state belongs to a cache with quantize={quantized!r}, here it is {self.quantize!r}"
            )
        if own.keys() != state.keys():
            raise ValueError("the state is not one of this model's cache: it has other layers")
        for name, tensor in own.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ValueError(
                    f"the state belongs to another cache: {name} is {given.dtype} {list(given.shape)}, "
                    f"here {tensor.dtype} {list(tensor.shape)}"
                )
        if not torch.equal(own.pop("sizes"), state["sizes"]):
            raise ValueError(
                f"the state belongs to a cache of other sinks, window and origin: {state['sizes'].tolist()}, "
                f"here {[self.sinks, self.window, self.origin]}"
            )
        self._stand = [0] * self.batch_size, None  # until all of it is there
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._stand = state["seen"].tolist(), None

    def __repr__(self) -> str:
        seen = self._seen[0] if len(set(self._seen)) == 1 else self._seen
        return (
            f"SinkCache(sinks={self.sinks}, window={self.window}, batch_size={self.batch_size}, "
            f"chunk={self.chunk}, seen={seen}, {self.nbytes / 1e6:.1f} MB of {self.quantize or self.dtype} "
            f"on {self.device})"
        )

    # What a forward asks for (models/step.py: Cache)

    def plan(self, length: int, lengths: Sequence[int] | None = None, counted: bool = False) -> Plan:
        """Where `length` new tokens per row will stand; `lengths` [B] of them are real. No row moves.

        counted: one token per row past eviction is planned by its number alone, `Plan.t`. It can be committed;
        what to compute, `planned` says.
        """
        self._finish()
        lockstep = lengths is None and len(set(self._seen)) == 1
        seen = self._seen[:1] if lockstep else self._seen
        counts = [length] * len(seen) if lengths is None else list(lengths)
        alone = length == 1 and all(counts)  # one token for every row: it may take its slot at once
        if alone and self._prompted and self.device.type == "cpu":
            self._prompted = False
            trim_heap()  # from here on, a stream may run for days beside what its prompt once needed
        self._prompted |= length >= MANY
        evicting = alone and lockstep and seen[0] >= self.sinks + self.window
        if evicting and counted:
            return _SinkPlan(steps={}, stores=[], advance=[1] * self.batch_size, t=seen[0], by=self)
        maker = _plan_one if alone else _plan_chunk
        planned = {
            own: maker(self.sinks, window, self.origin, seen, counts, length, self.device)
            for own, window in self._windows.items()
        }
        tensors = None
        if evicting:
            # From now on, the plan of one token is that of the last one with other numbers.
            tensors = [tensor for step, moves in planned.values() for tensor in _varying(step, moves)]
            tensors += self._stored()
        return self._plan(planned, tensors, [length] * self.batch_size if lengths is None else counts)

    def planned(self, t: Tensor, origin: Tensor | None = None) -> Plan:
        """The plan of one token per row past eviction, from its number: int64 [1], on the cache's device.

        What `plan` gives, but computed there: the host neither knows t nor waits for anything. With the cache's
        origin as a tensor, int64 [1], too, nothing but `tensors` differs from one cache of these sizes to another.
        """
        windows = self._windows.items()
        start = self.origin if origin is None else origin
        planned = {own: _plan_number(self.sinks, window, start, t) for own, window in windows}
        tensors = None if origin is None else [t, origin, *self._stored()]
        return self._plan(planned, tensors, [1] * self.batch_size)

    def _stored(self) -> list[Tensor]:
        return [tensor for _, ring in self._rings for tensor in ring.tensors.values()]

    def _plan(
        self,
        planned: Mapping[int | None, tuple[Step, _Moves]],
        tensors: Sequence[Tensor] | None,
        advance: Sequence[int],
    ) -> _SinkPlan:
        stores = [_Memory(ring, planned[own][1]) for own, ring in self._rings]
        steps = {own: step for own, (step, _) in planned.items()}
        if len(self._windows) > 1 or self.window not in self._windows.values():
            # Frequencies that depend on a length depend on the cache's, also where a layer's window is shorter.
            steps = {own: replace(step, span=self.sinks + self.window) for own, step in steps.items()}
        return _SinkPlan(steps=steps, stores=stores, tensors=tensors, advance=advance)

    def commit(self, plan: Plan) -> None:
        """Keep what the forward computed, and move on.

        The chunk counts as seen before it is stored. Where Ctrl-C or a lack of memory cuts the storing off,
        whatever touches the cache next ends it: to write again is harmless, half a chunk is not.
        """
        assert isinstance(plan, _SinkPlan)
        self._stand = [seen + count for seen, count in zip(self._seen, plan.advance, strict=True)], plan
        self._finish()

    def _finish(self) -> None:
        seen, unfinished = self._stand
        if unfinished is not None:
            for store in unfinished.stores:
                store.keep()
        self._stand = seen, None  # also where nothing was left: whoever plans or looks has touched the cache


Move = tuple[Tensor | None, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Moves:
    """Which new tokens go to which slots: index tensors of equal length for rows, tokens and slots.

    Rows are None where all rows of the batch do the same.
    """

    parts: tuple[tuple[int, int], ...]  # the ranges of slots that a forward looks at, sinks first
    sinks: Move | None  # the new sinks, which take their slots before attention
    early: Move | None  # recent tokens that do so, too: one token alone
    late: Move | None  # recent tokens that take theirs when the chunk is committed; None: no chunk


class _Ring:
    """The keys and values of one layer: slots 0 … S-1 for the sinks, W more taken in turn."""

    def __init__(
        self, shape: tuple[int, int, int], sinks: int, window: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        batch, heads, dim = shape
        self.keys = torch.zeros(batch, heads, sinks + window, dim, dtype=dtype, device=device)
        if dtype == torch.float32 and device.type == "cpu":
            # Stored [B, G, D, S + W]: one query reads them 1.1 to 1.5 times as fast.
            self.values = torch.zeros(batch, heads, dim, sinks + window).transpose(2, 3)
        else:
            self.values = torch.zeros_like(self.keys)
        self.dtype = dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held, each [(2,) B, G, slots, …]; what recent tokens write to comes last."""
        return {"keys": self.keys, "values": self.values}

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [B, G, T, D] in the form in which recent ones are stored, and seen."""
        return k, v

    def write_sinks(self, move: Move, k: Tensor, v: Tensor) -> None:
        self.write(move, k, v)

    def write(self, move: Move, k: Tensor, v: Tensor) -> None:
        """Recent tokens, as `stored` made them, take their slots."""
        _put(self.keys, move, k)
        _put(self.values, move, v)

    def read(self, parts: Sequence[tuple[int, int]], *chunk: Tensor) -> tuple[Tensor, Tensor]:
        """What stands in these slots, and behind it a `stored` chunk: keys and values [B, G, K, D]."""
        if not chunk:
            ((start, stop),) = parts
            return self.keys[:, :, start:stop], self.values[:, :, start:stop]
        k, v = chunk
        return (
            torch.cat([*(self.keys[:, :, start:stop] for start, stop in parts), k], 2),
            torch.cat([*(self.values[:, :, start:stop] for start, stop in parts), v], 2),
        )


class _Int8Ring:
    """As `_Ring`; but a recent key or value [D] is whole numbers in -127 … 127, and a scale of its own.

    The sinks stay as they are: all that follows looks at them, for ever, and they are few. Keys and values
    lie together, [2, B, G, slots, …], so that one token takes half as many small kernels.
    """

    def __init__(
        self, shape: tuple[int, int, int], sinks: int, window: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        batch, heads, dim = shape
        self.sinks = torch.zeros(2, batch, heads, sinks, dim, dtype=dtype, device=device)
        self.scales = torch.zeros(2, batch, heads, window, 1, dtype=dtype, device=device)
        self.numbers = torch.zeros(2, batch, heads, window, dim, dtype=torch.int8, device=device)
        self.dtype = dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"sinks": self.sinks, "scales": self.scales, "numbers": self.numbers}

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack((k, v))
        heads, dim = self.numbers.shape[2], self.numbers.shape[4]
        if both.shape[2] != heads or both.shape[4] != dim:  # what is copied below would be repeated to fit
            raise ValueError(
                f"the cache was made for keys of {heads} heads of {dim}, the model's are {list(k.shape)}"
            )
        # The numbers belong to the scale as it is stored. So a scale in bfloat16 costs nothing: 0.66 % of a
        # Gaussian vector is lost, as with one in float32.
        scales = both.abs().amax(-1, keepdim=True) / 127
        wide = scales.float() if scales.itemsize == 2 else scales
        numbers = both / wide.clamp(min=torch.finfo(wide.dtype).tiny)
        return numbers.round_().clamp_(-127, 127).to(torch.int8), scales

    def write_sinks(self, move: Move, k: Tensor, v: Tensor) -> None:
        _put(self.sinks, move, torch.stack((k, v)))

    def write(self, move: Move, numbers: Tensor, scales: Tensor) -> None:
        rows, tokens, slots = move
        behind = rows, tokens, slots - self.sinks.shape[3]
        _put(self.numbers, behind, numbers)
        _put(self.scales, behind, scales)

    def read(self, parts: Sequence[tuple[int, int]], *chunk: Tensor) -> tuple[Tensor, Tensor]:
        first = self.sinks.shape[3]
        sunk = max((min(stop, first) for _, stop in parts), default=0)
        spans = [slice(max(start - first, 0), stop - first) for start, stop in parts if stop > first]
        recent: list[tuple[Tensor, ...]] = [
            (self.numbers[:, :, :, span], self.scales[:, :, :, span]) for span in spans
        ]
        if chunk:
            recent.append(chunk)
        numbers, scales = zip(*recent, strict=True) if recent else ((), ())
        return dequantized(self.sinks[:, :, :, :sunk], numbers, scales)


def dequantized(sinks: Tensor, numbers: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values, each [B, G, K, D]: the sinks, and behind them numbers · scales, all [2, B, G, …, D].

    A recording has it as one call, in whose place dot products can be put that look at the numbers themselves.
    """
    if has_torch_function_unary(sinks):
        return handle_torch_function(dequantized, (sinks,), sinks, numbers, scales)
    *outer, sunk, dim = sinks.shape
    sizes = [sunk, *(part.shape[3] for part in numbers)]
    # Filled in place: joining afterwards what was multiplied before takes up to 20 times as long.
    both = sinks.new_empty(*outer, sum(sizes), dim)
    first, *places = torch.split(both, sizes, 3)
    first.copy_(sinks)
    for place, number, scale in zip(places, numbers, scales, strict=True):
        place.copy_(number).mul_(scale)
    keys, values = both.unbind()
    return keys, values


RINGS: dict[str | None, type[_Ring] | type[_Int8Ring]] = {None: _Ring, "int8": _Int8Ring}


def _put(store: Tensor, move: Move, new: Tensor) -> None:
    """New tokens [(2,) B, G, T, …] to their slots in a store [(2,) B, G, slots, …]."""
    rows, tokens, slots = move
    if rows is not None:
        store[..., rows, :, slots, :] = new[..., rows, :, tokens, :]
    elif len(tokens) == new.shape[-2]:
        store.index_copy_(-2, slots, new)
    else:
        store.index_copy_(-2, slots, new.index_select(-2, tokens))


class _Memory:
    """One layer's ring during one forward."""

    def __init__(self, ring: _Ring | _Int8Ring, moves: _Moves) -> None:
        self._ring, self._moves = ring, moves
        self._chunk: tuple[Tensor, Tensor] | None = None  # the chunk's own, until it is committed

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ring, moves = self._ring, self._moves
        if k.dtype != ring.dtype or v.dtype != ring.dtype:
            raise ValueError(
                f"the cache was made for {ring.dtype}, the model computes in {v.dtype}: "
                f"make a SinkCache for the model as it is, and leave autocast off"
            )
        if moves.sinks is not None:
            ring.write_sinks(moves.sinks, k, v)
        if moves.late is not None:
            self._chunk = ring.stored(k, v)
            return ring.read(moves.parts, *self._chunk)
        if moves.early is not None:
            ring.write(moves.early, *ring.stored(k, v))
        return ring.read(moves.parts)

    def keep(self) -> None:
        if self._chunk is not None and self._moves.late is not None:
            self._ring.write(self._moves.late, *self._chunk)


@dataclass(frozen=True, eq=False, kw_only=True)
class _SinkPlan(Plan):
    stores: Sequence[_Memory]
    advance: Sequence[int]  # how many tokens each row takes in


def _varying(step: Step, moves: _Moves) -> list[Tensor]:
    """The tensors in which one token's plan differs from the next one's."""
    assert moves.early is not None
    return [step.slots, step.near, step.far, step.keys, *moves.early[1:]]


def _plan_next(sinks: int, window: int, origin: int, seen: int, device: torch.device) -> tuple[Step, _Moves]:
    """One token, all rows in lockstep. It takes the slot of the key that it no longer sees, then meets all.

    S = 2, W = 3, t = 9: slot 2 + (9 - 2) % 3 = 3, where token 6 stood; see `Step`.
    """
    total = sinks + window
    lap = (seen - sinks) % window
    slot = seen if seen < sinks else sinks + lap
    near, far = origin + seen, min(seen, total - 1)
    apart = sinks > 0 and (origin > 0 or seen >= total)
    # One small tensor instead of many: this is done for every token.
    numbers = [slot, 0, near, far] if seen >= sinks else [slot, 0, near, far, seen]
    pinned = device.type == "cuda"  # or the copy would wait for all that the device has still to do
    fresh = torch.tensor(numbers, pin_memory=pinned).to(device, non_blocking=True)
    slots, here, *places = fresh.view(-1, 1, 1).unbind()
    held, visible = min(-(-(seen + 1) // STRIDE) * STRIDE, total), None
    if held < total or seen + 1 < total:
        keys = torch.arange(held, device=device)
        visible = None if seen + 1 == held else (keys <= seen)[None, None]
        if origin:
            keys[sinks:] += origin
    else:  # behind the sinks: this lap's tokens up to t, then what is left of the lap before
        parts = (0, sinks), (near - lap, near + 1), (near - window + 1, near - lap)
        keys = torch.cat([torch.arange(start, stop, device=device) for start, stop in parts])
    step = Step(
        slots=slots,
        near=places[0],
        far=places[1],
        own=places[-1] if origin and seen < sinks else places[0],
        keys=keys[None],
        visible=visible,
        sinks=min(sinks, held) if apart else 0,
        span=total,
    )
    move = None, here[0], slots[0]
    sunk, early = (move, None) if seen < sinks else (None, move)
    return step, _Moves(((0, held),), sunk, early, None)


def _plan_number(sinks: int, window: int, origin: int | Tensor, t: Tensor) -> tuple[Step, _Moves]:
    """`_plan_next` past eviction, from t as a tensor, int64 [1], of which nobody here knows the value."""
    total = sinks + window
    slots = (t - sinks) % window + sinks
    near = (t + origin)[None]
    slot = torch.arange(total, device=t.device)
    step = Step(
        slots=slots[None],
        near=near,
        far=torch.full_like(near, total - 1),
        own=near,
        keys=torch.where(slot < sinks, slot, near - (slots - slot) % window),
        visible=None,
        sinks=sinks,
        span=total,
    )
    return step, _Moves(((0, total),), None, (None, torch.zeros_like(t), slots), None)


def _plan_run(
    sinks: int, window: int, origin: int, seen: int, length: int, device: torch.device
) -> tuple[Step, _Moves]:
    """T tokens, all rows in lockstep: they meet the sinks, what is held behind them in order, and each other.

    New sinks take their slots at once (nothing stood there, so nothing is lost if the forward fails), and are
    hidden among the chunk's own keys. New recent tokens take theirs when the chunk is committed: until then
    its earlier queries need what they will overwrite.

    S = 2, W = 3, 4 tokens after 7: the slots hold 0 1 5 6 4, of which the first query, 7, sees 0 1 and 5 6,
    so the keys are those and the tokens 7 8 9 10; 8 9 10 are kept.
    """
    total, end = sinks + window, seen + length
    columns = min(sinks, end)
    held = max(0, min(seen - sinks, window - 1))  # keys behind the sinks that the first query sees
    first = seen - held
    slot = sinks + (first - sinks) % window
    ahead = min(held, total - slot)  # of them, up to the end of the ring
    parts = (0, columns), (slot, slot + ahead), (sinks, sinks + held - ahead)

    places = torch.arange(seen, end, device=device)[None]
    slots = torch.where(places < sinks, places, sinks + (places - sinks) % window)
    near = places + origin
    apart = sinks > 0 and (origin > 0 or end > total)
    run = torch.arange(origin + first, origin + end, device=device)
    step = Step(
        slots=slots,
        near=near,
        far=places.clamp(max=total - 1),
        own=torch.where(places < sinks, places, near) if origin else near,
        keys=torch.cat((torch.arange(columns, device=device), run))[None],
        visible=None,
        sinks=columns if apart else 0,
        span=total,
        band=Band(seen, first, columns, sinks, window),
    )
    tokens = torch.arange(length, device=device)
    kept = max(0, sinks - seen, length - window)
    sunk = None if seen >= sinks else (None, tokens[: columns - seen], slots[0, : columns - seen])
    late = None, tokens[kept:], slots[0, kept:]
    return step, _Moves(tuple(part for part in parts if part[0] < part[1]), sunk, None, late)


def _plan_one(
    sinks: int, window: int, origin: int, seen: Sequence[int], counts: Sequence[int], length: int,
    device: torch.device,
) -> tuple[Step, _Moves]:  # fmt: skip
    """One token per row; see `_plan_next`, which serves where all rows stand at the same place."""
    if len(seen) == 1:
        return _plan_next(sinks, window, origin, seen[0], device)
    total = sinks + window
    held = min(-(-(max(seen) + 1) // STRIDE) * STRIDE, total)
    places = torch.tensor(seen)[:, None]  # [R, 1]
    slots = torch.where(places < sinks, places, sinks + (places - sinks) % window)
    keys = _held_places(sinks, window, places + 1, held)
    full = min(seen) + 1 >= held
    step = _step(sinks, window, origin, places, slots, keys, None if full else keys[:, None] >= 0, device)
    if min(seen) < sinks:
        sunk, early = (_move(chosen, slots, device) for chosen in (places < sinks, places >= sinks))
        return step, _Moves(((0, held),), sunk, early, None)
    rows = torch.arange(len(seen), device=device)
    return step, _Moves(((0, held),), None, (rows, torch.zeros_like(rows), step.slots[:, 0]), None)


def _plan_chunk(
    sinks: int, window: int, origin: int, seen: Sequence[int], counts: Sequence[int], length: int,
    device: torch.device,
) -> tuple[Step, _Moves]:  # fmt: skip
    """T tokens per row, of which `counts` are real: they meet the slots held and, behind them, each other.

    As in `_plan_run`, which serves rows in lockstep; but here the slots stay in their order.

    S = 2, W = 3, 4 tokens on an empty row: held is 2, the keys are the slots 0 1 and the tokens 0 1 2 3;
    tokens 0 and 1 are written first and hidden behind, so token 3 sees keys at the places 0 1 - - 2 3.
    """
    if len(seen) == 1 and counts[0] == length:
        return _plan_run(sinks, window, origin, seen[0], length, device)
    total = sinks + window
    ends = [start + count for start, count in zip(seen, counts, strict=True)]
    held = max(min(max(seen), total), min(max(ends), sinks))
    start = torch.tensor(seen)[:, None]  # [R, 1]
    places = start + torch.arange(length)  # [R, T]
    real = torch.arange(length) < torch.tensor(counts)[:, None]
    slots = torch.where(places < sinks, places, sinks + (places - sinks) % window)
    sunk = real & (places < sinks)
    late = real & (places >= sinks) & (places >= torch.tensor(ends)[:, None] - window)

    stored = _held_places(sinks, window, start, held)
    slot = torch.arange(held)
    stored = torch.where((slot < sinks) & (slot < torch.tensor(ends)[:, None]), slot, stored)
    keys = torch.cat((stored, torch.where(sunk, -1, places)), 1)  # [R, held + T]
    key, query = keys[:, None, :], places[:, :, None]
    visible = (key >= 0) & (key <= query) & ((key < sinks) | (key > query - window))
    step = _step(sinks, window, origin, places, slots, keys, visible, device)
    moves = _move(sunk, slots, device), None, _move(late, slots, device, True)
    return step, _Moves(((0, held),), *moves)


def _held_places(sinks: int, window: int, seen: Tensor, held: int) -> Tensor:
    """Which token each of the first `held` slots has, after `seen` [R, 1] tokens: [R, held]; -1 for none."""
    slot = torch.arange(held)
    recent = seen - 1 - (seen - 1 - slot) % window
    return torch.where(slot >= seen, -1, torch.where(slot < sinks, slot, recent))


def _step(
    sinks: int, window: int, origin: int, places: Tensor, slots: Tensor, keys: Tensor,
    visible: Tensor | None, device: torch.device,
) -> Step:  # fmt: skip
    """The Step, from places [R, T] and keys [R, K] that count from 0."""
    total = sinks + window
    far = places.clamp(max=total - 1)
    apart = sinks > 0 and (origin > 0 or bool((places[:, -1] >= total).any()))
    columns = min(sinks, keys.shape[1]) if apart else 0  # the sinks come first among the keys
    near = places + origin
    own = torch.where(places < sinks, places, near) if origin else near
    if origin:
        column = torch.arange(keys.shape[1])
        keys = torch.where(column < columns, keys, keys + origin)
    return Step(
        slots=slots.to(device),
        near=near.to(device),
        far=far.to(device),
        own=own.to(device),
        keys=keys.to(device),
        visible=None if visible is None else visible.to(device),
        sinks=columns,
        span=total,
    )


def _move(chosen: Tensor, slots: Tensor, device: torch.device, always: bool = False) -> Move | None:
    """The chosen [R, T] tokens and their slots as index tensors; None where there are none."""
    rows, tokens = chosen.nonzero(as_tuple=True)
    if not always and not len(tokens):
        return None
    where = slots[rows, tokens].to(device)
    return rows.to(device), tokens.to(device), where


def _row_numbers(rows: Sequence[int] | Tensor, batch_size: int) -> list[int]:
    given = rows.tolist() if isinstance(rows, Tensor) else rows
    try:
        numbers = [-1 if isinstance(row, bool) else index(row) for row in given]
    except TypeError:
        numbers = [-1]
    if not all(0 <= number < batch_size for number in numbers):
        raise ValueError(f"rows must be a list of row numbers in 0 … {batch_size - 1}, not {given}")
    return numbers


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
