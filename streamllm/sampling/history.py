"""History: the last tokens of a stream, and what is counted in them at a constant cost per token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Protocol, TypeVar, cast

from streamllm.sampling.counters import NgramCounts

LOOP_NGRAM = 4  # the length of the n-grams whose repetition `loop_share` measures


class Counter(Protocol):
    """Something that is counted in the last `window` tokens.

    After `push` of any tokens it must equal a new one after `push` of the last `window` of them.
    """

    window: int

    def push(self, token: int) -> None: ...


C = TypeVar("C", bound=Counter)


class History:
    """The last tokens of a stream.

    The list of the tokens is the whole state: `History(size, tokens)` equals the history that the tokens were
    pushed to one by one. `push` is one append to the list. Counters read the list when they are asked for, so an
    exception at any moment (Ctrl-C) leaves the list whole; a counter that was interrupted counts again.

    Attributes:
        size: at least so many of the last tokens are kept, and fewer than twice as many plus `SLACK`.
    """

    SLACK = 64  # tokens; without it a history of size 1 would be cut at every push

    def __init__(self, size: int, tokens: Iterable[int] = ()) -> None:
        if size < 1:
            raise ValueError(f"a history keeps at least 1 token, not {size}")
        self.size = size
        # The number of tokens that were dropped, and the tokens after them. One tuple, replaced at once.
        self._recent: tuple[int, list[int]] = (0, [])
        self._counters: dict[Hashable, _Entry] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        """How many tokens it holds now."""
        return len(self._recent[1])

    @property
    def total(self) -> int:
        """How many tokens it was given, with those that it dropped."""
        dropped, kept = self._recent
        return dropped + len(kept)

    def push(self, token: int) -> None:
        """Add the next token of the stream."""
        self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> None:
        """Add the next tokens of the stream: all of them, or none where an exception interrupts."""
        dropped, kept = self._recent
        kept += tuple(tokens)  # one call into C, which a signal cannot interrupt
        if len(kept) >= 2 * self.size + self.SLACK:
            cut = len(kept) - self.size
            self._recent = (dropped + cut, kept[cut:])

    def last(self, count: int) -> list[int]:
        """The last `count` tokens, oldest first; fewer where it holds fewer."""
        return self._recent[1][-count:] if count > 0 else []

    def grow(self, size: int) -> None:
        """Keep at least the last `size` tokens from now on. Tokens that were dropped do not come back."""
        self.size = max(self.size, size)

    def counter(self, kind: Callable[..., C], *parameters: Hashable) -> C:
        """The counter `kind(*parameters)` of the tokens so far. A kind with other parameters replaces it."""
        entry = self._counters.get(kind)
        if entry is None or entry.parameters != parameters:
            entry = _Entry(kind, parameters)
            self._counters[kind] = entry
        return cast(C, entry.catch_up(*self._recent))

    def loop_share(self, window: int = 512) -> float:
        """Which share of the 4-grams in the last `window` tokens occurred in them before: 0 … 1.

        It is 1 minus the share of distinct 4-grams: near 0 in ordinary prose, and nearly 1 - p / window in a text
        that repeats a phrase of p tokens.
        """
        return self.counter(_LoopNgrams, window).repeated_share()


class _LoopNgrams(NgramCounts):
    """A class of its own, because a history keeps one counter of a kind."""

    def __init__(self, window: int) -> None:
        super().__init__(window, LOOP_NGRAM)


class _Entry:
    """A counter, and how many tokens of the stream it has read."""

    def __init__(self, kind: Callable[..., Counter], parameters: tuple[Hashable, ...]) -> None:
        self._kind = kind
        self.parameters = parameters
        self._counter = kind(*parameters)
        self._read: int | None = 0  # None while it is reading: if that is interrupted, it counts again

    def catch_up(self, dropped: int, tokens: list[int]) -> Counter:
        """The counter, after reading the tokens that were pushed since the last call."""
        read, end = self._read, dropped + len(tokens)
        if read == end:
            return self._counter
        self._read = None
        first = max(dropped, end - self._counter.window)
        if read is None or read < first:
            self._counter, read = self._kind(*self.parameters), first
        for token in tokens[read - dropped :]:
            self._counter.push(token)
        self._read = end
        return self._counter
