"""Stream: text in, text out, forever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from streamllm.cache import SinkCache
from streamllm.generation import Loop
from streamllm.generation_config import GenerationConfig, SamplingSettings, resolve
from streamllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stream:
    """An endless text that a model and its user write together, in constant memory.

    `sinks`, `window`, `chunk`, `quantize`: see `SinkCache`, which is `stream.cache`. Each `generate` goes on where
    the text ends, after Ctrl-C, too.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        sinks: int = 4,
        window: int | None = None,
        chunk: int = 512,
        quantize: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.cache = SinkCache(model, sinks=sinks, window=window, chunk=chunk, quantize=quantize)
        self._loop = Loop(model, self.cache)
        self._decoder = tokenizer.decoder()
        self._held = ""  # the end of the generated text, while it may still become a stop string
        self._generated = 0
        self._started = False

    @property
    def seen(self) -> int:
        """How many tokens the cache has taken in."""
        return int(self.cache.seen[0])

    @property
    def said(self) -> int:
        """How many tokens the model has generated."""
        return self._generated

    def __repr__(self) -> str:
        return f"Stream({self._loop.model.__class__.__module__.rpartition('.')[2]}, {self.cache!r})"

    def feed(self, text: str) -> int:
        """Let the model read a text without generating. Returns its number of tokens."""
        tokens = self._encode(text)
        self._loop.push(tokens)
        self._written(tokens)
        self._loop.feed()
        return len(tokens)

    def generate(
        self,
        text: str = "",
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> Iterator[str]:
        """The text that the model generates after `text`, piece by piece, in whole characters.

        Ends before one of the strings in `stop`, which is not yielded; else as `streamllm.generate`, which
        describes the other arguments and errors. A piece may be empty while a character is not complete.
        Raises ValueError for an empty text at the start of a stream whose tokenizer adds no BOS token.
        """
        config = resolve(self._loop.model, generation_config, settings)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        tokens = self._encode(text)
        generated = self._loop.run(config, max_new_tokens, seed, tokens)
        self._written(tokens)
        return self._pieces(generated, stops)

    def reset(self) -> None:
        """Forget everything and start a new text."""
        self.cache.reset()
        self._loop = Loop(self._loop.model, self.cache)
        self._decoder = self.tokenizer.decoder()
        self._held = ""
        self._generated = 0
        self._started = False

    def _encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=not self._started)
        if not tokens and not self._started:
            raise ValueError(
                "the prompt is empty and the tokenizer adds no BOS token: give some text to begin with"
            )
        return tokens

    def _written(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._held = ""  # of an answer that was abandoned
        self._started = True
        for token in tokens:  # so that the next tokens are not decoded as the start of a text
            self._decoder.push(token)

    def _pieces(self, tokens: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
        for token in tokens:
            self._generated += 1
            self._held += self._decoder.push(token)
            # The stop string that ends first, however the text is cut into tokens; of two, the longer one.
            ends = [(at + len(stop), at) for stop in stops if (at := self._held.find(stop)) >= 0]
            if ends:
                piece = self._release(min(ends)[1])
                self._held = ""
                yield piece
                return
            yield self._release(len(self._held) - _overlap(self._held, stops))
        if self._held:
            yield self._release(len(self._held))

    def _release(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        return piece


def _overlap(text: str, stops: Sequence[str]) -> int:
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
