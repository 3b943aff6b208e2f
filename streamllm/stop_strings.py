"""Generated text that is not shown yet, because it may become a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """The text that one token completed."""

    text: str
    is_shown: bool = True  # False: the content of a special token, which is compared with stop strings only
    is_token: bool = True  # False: a second segment of the token before it


@dataclass(frozen=True)
class Held:
    """The last generated tokens, from the first on whose text is not all shown."""

    segments: tuple[Segment, ...] = ()
    told: int = 0  # characters of their text that were shown

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def add(self, *segments: Segment) -> Held:
        return Held((*self.segments, *segments), self.told)

    def shown(self, stop: int) -> str:
        """The text up to the offset `stop` that was not shown yet, without special tokens."""
        text, start = "", 0
        for segment in self.segments:
            if segment.is_shown:
                text += segment.text[max(0, self.told - start) : max(0, stop - start)]
            start += len(segment.text)
        return text

    def release(self, stops: Sequence[str]) -> tuple[str, Held]:
        """The text that can be shown, and what may still become a stop string."""
        text = self.text
        stop = max(self.told, len(text) - overlap(text[self.told :], stops))
        kept, start = list[Segment](), 0
        before = 0  # characters of the segments that are dropped
        for segment in self.segments:
            start += len(segment.text)
            if start > stop:
                kept.append(segment)
            else:
                before = start
        return self.shown(stop), Held(tuple(kept), stop - before if kept else 0)

    def find(self, stops: Sequence[str]) -> Stop | None:
        """The stop string that ends first, however the text is cut into tokens; of two, the longer one."""
        text = self.text
        ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop, self.told)) >= 0]
        if not ends:
            return None
        at = min(ends)[1]
        tokens, kept, start = 0, "", len(text)
        for segment in reversed(self.segments):
            if start < at or (start == at and segment.text):  # no text: it began a character that comes later
                break
            start -= len(segment.text)
            tokens += segment.is_token
            kept = segment.text[: max(0, at - start)] if segment.is_shown else ""
        return Stop(self.shown(at), tokens, kept)


@dataclass(frozen=True)
class Stop:
    """Where a stop string begins."""

    shown: str  # the text in front of it that was not shown yet
    tokens: int  # how many tokens at the end hold it
    kept: str  # the text in front of it in the first of these tokens


def check_stops(stop: str | Sequence[str]) -> list[str]:
    """The stop strings of a call. Raises TypeError for anything else, ValueError for an empty one."""
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop must be a string or a list of strings, not {stop!r}")
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop must be a string or a list of strings, not {text!r}")
        if not text:
            raise ValueError("a stop string must not be empty")
    return stops


def overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
