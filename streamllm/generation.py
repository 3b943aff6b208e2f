"""generate(): the loop from tokens to tokens, for one stream, without an end unless one is given."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.generation_config import GenerationConfig, SamplingSettings, resolve
from streamllm.models.step import geometry_of
from streamllm.sampling import check_finite, choose, next_token
from streamllm.tensor_parallel import agreed_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Device types that work through a queue: the next forward is queued before the last token is read from them.
RUN_AHEAD = ("cuda",)


def generate(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    cache: SinkCache | None = None,
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    generation_config: GenerationConfig | None = None,
    **settings: Unpack[SamplingSettings],
) -> Iterator[int]:
    """The tokens that follow `tokens` (ids, [T] or [1, T]) in the stream that `cache` holds, one by one.

    `max_new_tokens=None` goes on forever, in constant memory. `seed` makes sampling repeatable. The settings
    temperature, top_k, top_p, min_p, repetition_penalty and eos are those of `GenerationConfig`. Those that are
    not given are the checkpoint's (generation_config.json), or greedy. An id in `eos` (an empty list for
    none) ends the text, and is the last one yielded.

    The last token yielded is not in the cache yet: begin the next call's tokens with it. After an exception
    or Ctrl-C, `cache.seen` tells how far the stream came, and the cache can be used again.

    Raises ValueError for an empty list of tokens, for tokens outside the vocabulary and for settings out of
    range; UnsupportedConfig where generation_config.json asks for what is not supported; TypeError for tokens
    that are not whole numbers and for unknown settings.
    """
    ids = _ids(tokens)
    if not ids:
        raise ValueError("there are no tokens to begin with: give a prompt, or a BOS token")
    config = resolve(model, generation_config, settings)
    cache = SinkCache(model) if cache is None else cache
    return Loop(model, cache).run(config, max_new_tokens, seed, ids)


def _ids(tokens: Sequence[int] | Tensor) -> list[int]:
    if isinstance(tokens, Tensor):
        if tokens.dim() == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.dim() != 1:
            raise ValueError(
                f"generate() runs one stream, of tokens [T] or [1, T], not of shape {list(tokens.shape)}"
            )
        tokens = tokens.tolist()
    return [operator.index(token) for token in tokens]


class Loop:
    """One stream between a model and its cache: the tokens still to be fed, and the logits after the last one.

    It can be interrupted anywhere and resumed: `unfed` are the tokens that the cache has not taken in yet.

    A device that works through a queue (`RUN_AHEAD`) never waits for the host: a token is fed to the next forward
    on the device, and read by the host only then. The cache steps back from that forward before the token is
    yielded, and on again when the next one is asked for. So between two tokens the state is the same as if
    nothing had run ahead.
    """

    def __init__(self, model: nn.Module, cache: SinkCache) -> None:
        if cache.batch_size != 1:
            raise ValueError(
                f"generate() runs one stream; the cache was made for a batch of {cache.batch_size}"
            )
        self.model, self.cache = model, cache
        self.vocab_size = geometry_of(model).vocab_size
        self.unfed: list[int] = []
        self.logits: Tensor | None = None  # [V], after the last token fed
        self.past: set[int] = set()  # the tokens of the stream so far
        self.seen_tokens: Tensor | None = None  # the same as bool [V], once the repetition penalty needs it
        self._ahead: _Ahead | None = None  # the forward of `unfed`, if that one token was run ahead

    def push(self, tokens: Sequence[int], on_device: Tensor | None = None) -> None:
        """Tokens to take in before the next one is chosen. on_device: the same, int64, where the device has them.

        Raises ValueError for ids outside the model's vocabulary.
        """
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside the model's vocabulary of 0 … {self.vocab_size - 1}"
            )
        self.unfed.extend(tokens)
        self.past.update(tokens)
        if self.seen_tokens is not None:
            with torch.inference_mode():
                if on_device is None:
                    on_device = torch.tensor(list(tokens), dtype=torch.int64, device=self.cache.device)
                self.seen_tokens.index_fill_(0, on_device, True)

    def feed(self) -> None:
        """Let the cache take in the tokens that are still to be fed."""
        if not self.unfed:
            return
        before = int(self.cache.seen[0])
        ahead, self._ahead, self.logits = self._ahead, None, None
        try:
            if ahead is not None and len(self.unfed) == 1 and self.cache.step_on(ahead.back):
                self.logits = ahead.logits
                return
            with torch.inference_mode():
                tokens = torch.tensor([self.unfed], device=self.cache.device)
                self.logits = self.model(tokens, self.cache, logits_to_keep=1)[0, -1]
        finally:
            taken = int(self.cache.seen[0]) - before
            if self.logits is None and taken == len(self.unfed):  # interrupted before the logits arrived
                self.cache.step_back()
                taken -= 1
            del self.unfed[:taken]

    def run(
        self,
        config: GenerationConfig,
        max_new_tokens: int | None,
        seed: int | None,
        tokens: Sequence[int] = (),
    ) -> Iterator[int]:
        """Push `tokens`, then feed, choose and push, until an eos token or `max_new_tokens`.

        Raises ValueError before anything is pushed.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or above, or None for no end, not {max_new_tokens}")
        if seed is not None and not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seed must be a whole number of 64 bits, not {seed}")
        if not tokens and not self.unfed and self.logits is None:
            raise ValueError("the stream is empty: give a prompt")
        seed = agreed_seed(self.model, seed, tokens)
        self.push(tokens)
        generator = None
        if seed is not None:
            generator = torch.Generator(self.cache.device).manual_seed(seed)
        return self._tokens(config, max_new_tokens, generator)

    def _tokens(
        self, config: GenerationConfig, max_new_tokens: int | None, generator: torch.Generator | None
    ) -> Iterator[int]:
        if config.repetition_penalty != 1.0 and self.seen_tokens is None:
            with torch.inference_mode():
                self.seen_tokens = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.cache.device)
                self.seen_tokens[list(self.past)] = True
        done = 0
        failed: BaseException | None = None
        while max_new_tokens is None or done < max_new_tokens:
            if failed is not None:  # now, as without running ahead: the tokens before it were yielded
                self.logits = None
                raise failed
            self.feed()
            done += 1
            if self.cache.device.type in RUN_AHEAD and done != max_new_tokens:
                token, failed = self._choose_and_run_ahead(config, generator)
            else:
                token = self._choose(config, generator)
            try:
                yield token
            finally:
                if failed is not None and not isinstance(failed, Exception):
                    raise failed  # Ctrl-C is not lost when the caller wants no more tokens
            if token in config.eos:
                return

    def _choose(self, config: GenerationConfig, generator: torch.Generator | None) -> int:
        assert self.logits is not None
        with torch.inference_mode():
            token = next_token(self.logits, config, generator, self.seen_tokens)
        self.push([token])
        return token

    def _choose_and_run_ahead(
        self, config: GenerationConfig, generator: torch.Generator | None
    ) -> tuple[int, BaseException | None]:
        """The next token, pushed, and the error of feeding it, if there was one."""
        assert self.logits is not None
        before = int(self.cache.seen[0])
        ahead: _Ahead | None = None
        failed: BaseException | None = None
        with torch.inference_mode():
            token, best = choose(self.logits, config, generator, self.seen_tokens)
            answer = _Answer(torch.cat((token.double(), best.double())))
            try:
                logits = self.model(token[None], self.cache, logits_to_keep=1)[0, -1]
                answer.wait()
            except BaseException as error:
                failed = error
        if int(self.cache.seen[0]) > before:
            back = self.cache.step_back()
            ahead = None if failed is not None else _Ahead(logits, back)
        value, finite = answer.wait()
        check_finite(finite)
        self.push([int(value)], token)
        self._ahead = ahead
        return int(value), failed


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A forward that ran before its logits were asked for."""

    logits: Tensor  # [V]
    back: object  # of the cache's `step_back` from it


class _Answer:
    """Numbers on their way to the host. Work that the device has queued behind them is not waited for."""

    def __init__(self, numbers: Tensor) -> None:
        cuda = numbers.device.type == "cuda"
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=cuda)
        self._numbers.copy_(numbers, non_blocking=cuda)
        self._there = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        if self._there is not None:
            self._there.record()

    def wait(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()
