"""Row: what a batch needs to know of one stream. A stream of ids, or of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from streamllm.cache import SinkCache
from streamllm.loop import Loop
from streamllm.sampling import Sampler
from streamllm.session.dialogue import Dialogue
from streamllm.stream import Stream
from streamllm.tokenizer import Tokenizer


class Row(ABC):
    """One stream of a batch, with the settings of the call that runs on it."""

    served = 0  # the step in which a chunk of its prompt was last read

    @property
    @abstractmethod
    def loop(self) -> Loop: ...

    @property
    @abstractmethod
    def sampler(self) -> Sampler: ...

    @property
    @abstractmethod
    def generated(self) -> int:
        """How many tokens the call has generated, see `Sampler.edits`."""

    @property
    def is_cancelled(self) -> bool:
        return False

    @property
    def is_paused(self) -> bool:
        """Whether its reader is too far behind."""
        return False

    @abstractmethod
    def needs_token(self) -> bool:
        """Whether a token must be drawn before `pass_on`."""

    @abstractmethod
    def before_draw(self) -> None:
        """Make the loop ready for the next token."""

    @abstractmethod
    def pass_on(self) -> bool:
        """Hand what was drawn to the reader. Returns whether the call has ended."""

    @abstractmethod
    def end(self, error: Exception | None) -> None:
        """The stream has left the batch. error: what ended it, if it was an error."""


class TokenRow(Row):
    """A stream of ids. `receive` gets each token."""

    def __init__(
        self, loop: Loop, sampler: Sampler, max_new_tokens: int | None, receive: Callable[[int], None]
    ) -> None:
        self._loop, self._sampler, self._limit, self._receive = loop, sampler, max_new_tokens, receive
        self._generated = 0
        self.error: Exception | None = None

    @property
    def loop(self) -> Loop:
        return self._loop

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @property
    def generated(self) -> int:
        return self._generated

    def needs_token(self) -> bool:
        return self._limit != 0

    def before_draw(self) -> None:
        self._loop.push_drawn()

    def pass_on(self) -> bool:
        token = self._loop.drawn
        if token is None:
            return True  # max_new_tokens is 0
        self._generated += 1
        self._receive(token)
        return token in self._sampler.config.eos or self._generated == self._limit

    def end(self, error: Exception | None) -> None:
        self.error = error


class Receiver(Protocol):
    """Who gets the text of a stream."""

    @property
    def is_cancelled(self) -> bool: ...
    @property
    def is_full(self) -> bool: ...
    def give(self, piece: str) -> None: ...
    def end(self, error: Exception | None) -> None: ...


class TextRow(Row):
    """A stream of text: a `Stream`, and the pieces of its running `generate` or `chat`."""

    def __init__(self, stream: Stream, pieces: Iterator[str], receiver: Receiver) -> None:
        self.stream, self._pieces, self._receiver = stream, pieces, receiver
        sampler = stream._sampler
        assert sampler is not None, "generate has made it"
        self._sampler = sampler
        self._before = stream.said

    @property
    def loop(self) -> Loop:
        return self.stream._loop

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @property
    def generated(self) -> int:
        return self.stream.said - self._before

    @property
    def is_cancelled(self) -> bool:
        return self._receiver.is_cancelled

    @property
    def is_paused(self) -> bool:
        return self._receiver.is_full

    def needs_token(self) -> bool:
        return self.stream._needs_token

    def before_draw(self) -> None:
        self.stream._before_draw()

    def pass_on(self) -> bool:
        while True:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._receiver.give(piece)
            if self.stream._goes_on and self.stream.finish_reason is None:
                return False

    def end(self, error: Exception | None) -> None:
        self._receiver.end(error)


class SlotStream(Stream):
    """A stream that was made for a slot: its cache has no memory until then."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, cache: SinkCache) -> None:
        self._given = cache
        super().__init__(
            model, tokenizer, cache.sinks, cache.window, cache.chunk, cache.quantize, snapshots=0
        )

    def _make_cache(self, sinks: int, dialogue: Dialogue | None = None) -> None:
        self._start(self._model, self._given, dialogue)

    @classmethod
    def _like(cls, model: nn.Module, tokenizer: Tokenizer, settings: dict[str, Any]) -> Stream:
        return Stream._like(model, tokenizer, settings)
