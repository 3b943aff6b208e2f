"""What is counted in the last tokens of a stream: tokens and n-grams, each with a cost per token that is constant."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """How often each token occurs among the last `window` tokens.

    The distinct tokens and their counts stand at the start of two arrays, which are updated in place.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._recent: deque[int] = deque()
        self._index: dict[int, int] = {}  # of each token in the arrays
        self._tokens = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.int64)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The distinct tokens, [n], in no particular order. A view that the next `push` changes."""
        return self._tokens[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """The count of each of `tokens`, [n]. A view that the next `push` changes."""
        return self._counts[: len(self._index)]

    def push(self, token: int) -> None:
        if self.window < 1:
            return
        self._recent.append(token)
        if len(self._recent) > self.window:
            self._remove(self._recent.popleft())
        index = self._index.get(token)
        if index is None:
            index = len(self._index)
            if index == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._index[token] = index
            self._tokens[index] = token
        self._counts[index] += 1

    def _remove(self, token: int) -> None:
        index = self._index[token]
        self._counts[index] -= 1
        if self._counts[index]:
            return
        last = len(self._index) - 1  # the last one fills the hole, so the arrays stay dense
        moved = int(self._tokens[last])
        self._tokens[index], self._counts[index] = moved, self._counts[last]
        self._index[moved] = index
        del self._index[token]
        self._counts[last] = 0


class NgramCounts:
    """The n-grams that lie within the last `window` tokens, by their first `size - 1` tokens."""

    def __init__(self, window: int, size: int) -> None:
        self.window = window
        self.size = size
        self._recent: deque[int] = deque()
        self._following: dict[tuple[int, ...], dict[int, int]] = {}  # how often each token follows a prefix
        self._distinct = 0

    def following(self) -> tuple[int, ...]:
        """The tokens that would complete an n-gram which occurs in the window already."""
        return tuple(self._following.get(self._at(-self.size + 1), ()))

    def repeated_share(self) -> float:
        """The share of the n-grams that occurred earlier in the window: 0 without any n-gram."""
        total = len(self._recent) - self.size + 1
        return 1 - self._distinct / total if total > 0 else 0.0

    def push(self, token: int) -> None:
        self._recent.append(token)
        if len(self._recent) >= self.size:
            *prefix, last = self._at(-self.size)
            counts = self._following.setdefault(tuple(prefix), {})
            self._distinct += last not in counts
            counts[last] = counts.get(last, 0) + 1
        if len(self._recent) > self.window:
            if len(self._recent) >= self.size:
                self._remove(tuple(self._recent[i] for i in range(self.size)))
            self._recent.popleft()

    def _at(self, start: int) -> tuple[int, ...]:
        """The tokens from index `start`, which is negative, to the end; fewer where there are fewer."""
        count = len(self._recent)
        return tuple(self._recent[i] for i in range(max(0, count + start), count))

    def _remove(self, ngram: tuple[int, ...]) -> None:
        *first, last = ngram
        prefix = tuple(first)
        counts = self._following[prefix]
        counts[last] -= 1
        if not counts[last]:
            del counts[last]
            self._distinct -= 1
            if not counts:
                del self._following[prefix]
