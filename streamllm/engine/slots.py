"""Slots: the memory of all streams, and the forward that takes one token of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.cache.shared import (
    first_rows,
    move_row,
    new_rings,
    place_row,
    rings_of,
    row_without_memory,
    slots_used,
)

DUMMY_TOKEN = 0  # fed to rows that do not advance; their logits are ignored


class Slots:
    """One memory for `count` streams. Each stream is a `SinkCache` of batch 1, which lies in a slot while it runs.

    A forward takes the first n slots, where n is the number of slots, half of it, a quarter and so on: few streams do
    not pay for all slots, and n has few values. Streams move to lower slots where that makes n smaller.

    one_size: every forward takes all slots, so that a step which takes long to compile is compiled once.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        sinks: int = 4,
        window: int | None = None,
        chunk: int | None = None,
        quantize: str | None = None,
        one_size: bool = False,
    ) -> None:
        self._model = model
        self.memory = SinkCache(model, sinks, window, count, chunk, quantize=quantize)
        sizes = [count]
        while sizes[-1] > 1 and not one_size:
            sizes.append((sizes[-1] + 1) // 2)
        self._batches = {size: first_rows(self.memory, size) for size in reversed(sizes)}
        self._rows: list[SinkCache | None] = [None] * count
        self._homes: dict[SinkCache, Any] = {}  # the memory that streams had before, if any
        self._used = [0] * count  # how many entries of each slot were ever written

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> int:
        """How many slots hold no stream."""
        return self._rows.count(None)

    def new_cache(self) -> SinkCache:
        """The cache of a new stream, which needs no memory until it is placed."""
        return row_without_memory(self.memory)

    def check(self, cache: SinkCache) -> None:
        """Raises ValueError where a cache that was made elsewhere cannot lie in a slot."""
        own = self.memory
        names = ("sinks", "window", "quantize", "dtype", "device", "origin")
        for name in names:
            given, here = getattr(cache, name), getattr(own, name)
            if given != here:
                raise ValueError(
                    f"the stream has {name}={given}, and the slots of this engine have {name}={here}: make an engine "
                    f"with the stream's settings"
                )
        if cache.geometry is not own.geometry or cache.batch_size != 1:
            raise ValueError("the stream belongs to another model: make an engine for that model")

    def place(self, cache: SinkCache) -> None:
        """Give a stream the lowest free slot."""
        number = self._rows.index(None)
        self._homes[cache] = rings_of(cache)
        self._move(cache, number)

    def release(self, cache: SinkCache, keep: bool = False) -> None:
        """Free the slot of a stream.

        A stream that had memory before goes back to it. Any other gets memory if `keep`; else it cannot be used again.
        """
        number = self._rows.index(cache)
        home = self._homes.pop(cache)
        self._leave(number)
        if home or keep:
            move_row(cache, home or new_rings(self.memory))
        else:
            rings_of(cache).clear()

    def give_memory(self, cache: SinkCache) -> None:
        """Give a stream that was not placed memory of its own, if it has none."""
        if not rings_of(cache):
            move_row(cache, new_rings(self.memory))

    def step(self, tokens: Mapping[SinkCache, int]) -> tuple[Tensor, list[int]]:
        """Feed a token to each of these streams. Returns the logits [n, V], and the row of each stream in them.

        The other streams do not advance.
        """
        size = self._tighten()
        batch = self._batches[size]
        rows = self._rows[:size]
        fed = [DUMMY_TOKEN if row is None else tokens.get(row, DUMMY_TOKEN) for row in rows]
        on_cuda = batch.device.type == "cuda"
        ids = torch.tensor(fed, dtype=torch.int64, device="cpu", pin_memory=on_cuda)[:, None]
        batch.gather(rows)
        with torch.inference_mode():
            logits = self._model(ids.to(batch.device, non_blocking=True), batch)[:, -1]
        for row in tokens:
            row.commit_token()
        for number in range(size):
            self._note_use(number)
        at = {row: number for number, row in enumerate(rows)}
        return logits, [at[row] for row in tokens]

    def _tighten(self) -> int:
        """Move streams to lower slots where the next forward can then be smaller. Returns its number of rows."""
        taken = [number for number, row in enumerate(self._rows) if row is not None]
        size = next(size for size in self._batches if size >= len(taken))
        for number in taken:
            if number >= size:
                row, to = self._rows[number], self._rows.index(None)
                assert row is not None
                self._leave(number)
                self._move(row, to)
        return size

    def _move(self, row: SinkCache, number: int) -> None:
        place_row(row, self.memory, number, self._used[number])
        self._rows[number] = row

    def _leave(self, number: int) -> None:
        self._note_use(number)
        self._rows[number] = None

    def _note_use(self, number: int) -> None:
        """Note how far a stream has written in its slot, because taking tokens out shortens the stream."""
        row = self._rows[number]
        if row is not None:
            self._used[number] = max(self._used[number], slots_used(row))
