"""View: how far the text of a stream was decoded and shown."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from streamllm.session.dialogue import Dialogue
from streamllm.stop_strings import Held


@dataclass(frozen=True)
class Cut:
    """Tokens that leave the stream, because they hold a stop string."""

    start: int  # the number of the first of them
    then: tuple[int, ...]  # the tokens of the text before the stop string
    cuts: int  # the cuts of the stream before this one
    dialogue: Dialogue | None = None  # the conversation without them; None: it stays


@dataclass(frozen=True)
class Drop:
    """A turn that leaves the window. It is noted before anything changes, so that `finish_drop` can complete it."""

    start: int  # its tokens have the numbers `start` … `stop` - 1
    stop: int
    entries: tuple[int, int]  # of the cache
    held: int  # the entries of the cache before
    left: tuple[int, ...]  # the last tokens without them
    oldest: int  # the first number that the window holds
    dialogue: Dialogue


@dataclass(frozen=True, eq=False)
class AnswerText:
    """The text of an answer that was shown: the first `count` pieces. After an interrupt, there may be more pieces."""

    begins: int  # the number of the answer's first generated token
    pieces: list[str]
    count: int

    @property
    def text(self) -> str:
        return "".join(self.pieces[: self.count])

    def add(self, piece: str) -> AnswerText:
        """One piece more, at a constant cost; `self` stays as it is."""
        self.pieces[self.count :] = [piece]
        return AnswerText(self.begins, self.pieces, self.count + 1)


@dataclass(frozen=True)
class Removed:
    """Tokens that were taken out of the stream: those with the numbers `start` … `stop` - 1."""

    start: int
    stop: int
    leaves_gap: bool  # False: the text goes on without them

    @staticmethod
    def add(removed: tuple[Removed, ...], new: Removed, oldest: int) -> tuple[Removed, ...]:
        """With one part more. oldest: the first number that matters."""
        parts = list[Removed]()
        for part in sorted((*removed, new), key=lambda part: part.start):
            if part.start >= part.stop or part.stop <= oldest:
                continue
            if parts and part.start < parts[-1].stop:
                last = parts[-1]
                part = Removed(last.start, max(last.stop, part.stop), last.leaves_gap or part.leaves_gap)
                parts.pop()
            parts.append(part)
        return tuple(parts)


@dataclass(frozen=True)
class View:
    """How far the text of a stream was decoded and shown. It is replaced as a whole."""

    number: int = 0  # the tokens before this number were decoded
    generated_to: int = 0  # the number after the last generated token that was decoded
    generated: int = 0  # how many tokens were generated
    held: Held = field(default_factory=Held)  # generated text that may become a stop string
    owed: str = ""  # generated text to show first
    unsaid: int = 0  # 1 where the last token was decoded and its piece was not yielded
    stopped: bool = False  # whether a stop string ended the text and its last piece was not yielded
    cut: Cut | None = None  # what is to be done first, with `number` unknown until then
    answer: AnswerText | None = None  # of the last answer in a conversation
    first: tuple[int, ...] = ()  # the first tokens, which become the sinks
    removed: tuple[
        Removed, ...
    ] = ()  # in order, not overlapping; those that the window has passed are left out

    def with_first(self, number: int, tokens: tuple[int, ...], sinks: int) -> View:
        """The view after the stream went on with `tokens`, from `number` on."""
        if number >= sinks and len(self.first) >= sinks:
            return self
        return replace(self, first=(*self.first[:number], *tokens)[:sinks])
