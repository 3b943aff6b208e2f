"""DRY ("don't repeat yourself"): a penalty for tokens that would continue a repetition, by its length.

Defined by p-e-w in oobabooga/textgen#5677, and as llama.cpp implements it (ggml-org/llama.cpp#9702).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

MAX_LOG_PENALTY = math.log(1e30)  # penalties stay finite in float32, also times a multiplier


class RepeatedSuffixes:
    """Where among the last `window` tokens the end of the text has occurred before, and how long the match is.

    A match of length m at index i: the m tokens up to index i equal the last m tokens. A new token extends the
    matches that it follows and ends all others. So only the places of this token are looked at: a constant number in
    ordinary text, at most `window` of them.

        a b c c b c y a b c     the last token is the c at index 9
            3 1   2             matches at the indices 2, 3 and 5
              c b   y           the tokens that follow them, and would repeat 3, 1 and 2 tokens

    A sequence in `breakers` cuts matches: they only count tokens behind its last occurrence in the window.
    """

    def __init__(self, window: int, breakers: tuple[tuple[int, ...], ...] = ()) -> None:
        self.window = window
        self._tokens: list[int] = []  # the token of index i is at i % window
        self._end = 0  # the index of the next token
        self._places: dict[int, deque[int]] = {}  # the indices of each token
        self._matches: dict[int, int] = {}  # index: length, which may reach out of the window
        self._breakers: dict[int, list[tuple[int, ...]]] = {}  # by their last token, the shortest first
        for breaker in sorted(breakers, key=len):
            self._breakers.setdefault(breaker[-1], []).append(breaker)
        self._breaks: deque[tuple[int, int]] = (
            deque()
        )  # the first and last index of each breaker in the window

    def push(self, token: int) -> None:
        if self.window < 1:
            return
        index, first = self._end, self._end + 1 - self.window
        if first > 0:
            self._forget(first - 1)
        places = self._places.setdefault(token, deque())
        self._matches = {place: self._matches.get(place - 1, 0) + 1 for place in places}
        places.append(index)
        if index < self.window:
            self._tokens.append(token)
        else:
            self._tokens[index % self.window] = token
        self._end += 1
        for breaker in self._breakers.get(token, ()):
            length = len(breaker)
            start = self._end - length
            if start >= max(first, 0) and all(
                self._tokens[(start + i) % self.window] == breaker[i] for i in range(length)
            ):
                self._breaks.append((start, index))
                break

    def continuations(self, shortest: int) -> dict[int, int]:
        """The tokens that would continue a match of at least `shortest` tokens, and the longest such match."""
        first = max(0, self._end - self.window)
        limit = self._since_break(first)
        longest: dict[int, int] = {}
        if limit < shortest:
            return longest
        for index, length in self._matches.items():
            length = min(length, limit, index - first + 1)
            if length >= shortest:
                token = self._tokens[(index + 1) % self.window]
                longest[token] = max(length, longest.get(token, 0))
        return longest

    def _forget(self, index: int) -> None:
        token = self._tokens[index % self.window]
        places = self._places[token]
        places.popleft()
        if not places:
            del self._places[token]
        while self._breaks and self._breaks[0][1] <= index:
            self._breaks.popleft()

    def _since_break(self, first: int) -> int:
        """How many tokens stand behind the last breaker that lies within the window as a whole."""
        for start, last in reversed(self._breaks):
            if start >= first:
                return self._end - 1 - last
        return self._end - first


def dry_penalties(
    repeats: RepeatedSuffixes,
    multiplier: float,
    base: float,
    allowed_length: int,
    exempt: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, float]]:
    """The tokens that would continue a repetition, and what is subtracted from the logit of each.

    This is multiplier * base ** (length - allowed_length) for a repetition of `length` tokens before this one;
    shorter ones than `allowed_length` are free. Breakers of a single token (`exempt`) are never penalised.
    """
    largest = MAX_LOG_PENALTY / math.log(base) if base > 1 else math.inf
    for token, length in repeats.continuations(allowed_length).items():
        if token not in exempt:
            yield token, multiplier * base ** min(length - allowed_length, largest)


def single_token_breakers(breakers: Sequence[tuple[int, ...]]) -> frozenset[int]:
    """The breakers of one token."""
    return frozenset(breaker[0] for breaker in breakers if len(breaker) == 1)
