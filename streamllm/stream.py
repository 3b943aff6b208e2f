"""Stream: text in, text out, for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from streamllm.cache import SinkCache
from streamllm.generate import Loop, settings
from streamllm.sampling import GenerationConfig
from streamllm.tokenizer import Tokenizer


class Stream:
    """A text that a model and its user write together, without end, in constant memory.

    `sinks`, `window`, `chunk`, `quantize`: see `SinkCache`, which is `stream.cache`. Each `generate` goes on
    where the text stands; after Ctrl-C, too.
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
        self._held = ""  # the end of what was said, while it may still become a stop string
        self._said = 0
        self._started = False

    @property
    def seen(self) -> int:
        """How many tokens the cache has taken in."""
        return int(self.cache.seen[0])

    @property
    def said(self) -> int:
        """How many tokens the model has said."""
        return self._said

    def __repr__(self) -> str:
        return f"Stream({self._loop.model.__class__.__module__.rpartition('.')[2]}, {self.cache!r})"

    def feed(self, text: str) -> int:
        """Let the model read a text without saying anything. Returns how many tokens it was."""
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
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos: Sequence[int] | int | None = None,
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> Iterator[str]:
        """What the model says after `text`, piece by piece, each piece whole characters.

        Ends with one of the strings in `stop`, which is not said; else as `streamllm.generate`, where the
        other arguments and errors are described. A piece may be empty while a character is not complete.
        Raises ValueError for an empty text at the start of a stream whose tokenizer adds no BOS token.
        """
        config = settings(
            self._loop.model,
            generation_config,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos=eos,
        )
        stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        tokens = self._encode(text)
        said = self._loop.run(config, max_new_tokens, seed, tokens)
        self._written(tokens)
        return self._pieces(said, stops)

    def reset(self) -> None:
        """Forget everything and start a new text."""
        self.cache.reset()
        self._loop = Loop(self._loop.model, self.cache)
        self._decoder = self.tokenizer.decoder()
        self._held = ""
        self._said = 0
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
            self._held = ""  # of an answer that was left alone
        self._started = True
        for token in tokens:  # what follows a text is not decoded as if it began one
            self._decoder.push(token)

    def _pieces(self, tokens: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
        for token in tokens:
            self._said += 1
            self._held += self._decoder.push(token)
            # the one that is complete first, however the text is cut into tokens; at once: the longer one
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
