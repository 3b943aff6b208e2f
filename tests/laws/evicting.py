"""Streams from which entries are taken out, next to the definition: lists that close up, entry by entry."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from tests.laws import reference
from tests.laws.networks import network
from tests.laws.scenarios import error


class EvictingStream(reference.Stream):
    """The reference implementation, with entries taken out of its lists.

    What is taken out of the longest list leaves the others, too.
    """

    def __init__(self, model: nn.Module, sinks: int, window: int) -> None:
        super().__init__(network(model), sinks, window)
        self.before: list[
            list[list[reference.Cached]]
        ] = []  # the lists before each token since the last eviction

    @property
    def longest(self) -> list[reference.Cached]:
        return self.cached[max(range(len(self.windows)), key=self.windows.__getitem__)]

    def step(self, token: int) -> reference.Array:
        self.before.append([list(entries) for entries in self.cached])
        return super().step(token)

    def evict_range(self, start: int, stop: int) -> None:
        tokens = {entry.token for entry in self.longest[start:stop]}
        for entries in self.cached:
            entries[:] = [entry for entry in entries if entry.token not in tokens]
        self.before.clear()

    def evict_for_space(self, n: int) -> None:
        excess = len(self.longest) + n - self.sinks - max(self.windows)
        self.evict_range(self.sinks, self.sinks + max(0, excess))

    def rewind(self, n: int) -> None:
        if n <= len(self.before):
            before = [*self.before, self.cached][len(self.before) - n]
            # What the tokens pushed out stays out. The next token would push it out, too, before it attends.
            self.cached = [
                [entry for entry in old if any(entry is other for other in now)]
                for old, now in zip(before, self.cached, strict=True)
            ]
            del self.before[len(self.before) - n :]
        else:  # before an eviction: nothing was pushed out then
            tokens = {entry.token for entry in self.longest[len(self.longest) - n :]}
            self.cached = [
                [entry for entry in entries if entry.token not in tokens] for entries in self.cached
            ]
            self.before.clear()


class EvictingRows:
    """The streams of a cache, each with its reference. Every operation is done on both.

    Attributes:
        worst: the largest difference of the logits so far, in standard deviations.
    """

    def __init__(self, model: nn.Module, cache: SinkCache, plain: nn.Module | None = None) -> None:
        self.model, self.cache = model, cache
        self.streams = [
            EvictingStream(model if plain is None else plain, cache.sinks, cache.window)
            for _ in range(cache.batch_size)
        ]
        self.worst = 0.0

    def copy(self) -> EvictingRows:
        """With a fork of the cache."""
        other = copy.copy(self)
        other.cache = self.cache.copy()
        other.streams = [copy.copy(stream) for stream in self.streams]
        for stream in other.streams:
            stream.cached = [list(entries) for entries in stream.cached]
            stream.before = [[list(entries) for entries in lists] for lists in stream.before]
        return other

    def feed(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Feed tokens [B, T], of which each row has `lengths` (None: T)."""
        got = self.model(tokens, self.cache, lengths=lengths)
        for row, count in enumerate([tokens.shape[1]] * len(tokens) if lengths is None else lengths):
            if count:
                wanted = [torch.from_numpy(self.streams[row].step(int(t))) for t in tokens[row, :count]]
                self.worst = max(self.worst, error(got[row, :count].double(), torch.stack(wanted)))
        self.check_held()

    def evict_range(self, start: int, stop: int, rows: Sequence[int] | None = None) -> None:
        self.cache.evict_range(start, stop, rows)
        for row in range(len(self.streams)) if rows is None else rows:
            self.streams[row].evict_range(start, stop)
        self.check_held()

    def evict_for_space(self, n: int, rows: Sequence[int] | None = None) -> None:
        self.cache.evict_for_space(n, rows)
        for row in range(len(self.streams)) if rows is None else rows:
            self.streams[row].evict_for_space(n)
        self.check_held()

    def rewind(self, n: int, rows: Sequence[int] | None = None) -> None:
        seen = self.cache.seen
        self.cache.rewind(n, rows)
        for row in range(len(self.streams)) if rows is None else rows:
            self.streams[row].rewind(n)
            seen[row] -= n
        self.check_held()
        assert self.cache.seen.tolist() == seen.tolist()

    def check_held(self) -> None:
        assert self.cache.held.tolist() == [len(stream.longest) for stream in self.streams]
