"""generate(): the loop from tokens to tokens, one stream, without end unless told."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.models.step import geometry_of
from streamllm.sampling import GenerationConfig, attached, check_finite, choose, next_token
from streamllm.weights.errors import UnsupportedConfig

# Devices that work through a queue: they are given the next forward before the last token is read from them.
AHEAD = ("cuda",)


def generate(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    cache: SinkCache | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos: Sequence[int] | int | None = None,
    seed: int | None = None,
    generation_config: GenerationConfig | None = None,
) -> Iterator[int]:
    """The tokens that follow `tokens` (ids, [T] or [1, T]) in the stream that `cache` holds, one by one.

    `max_new_tokens=None` goes on for ever, in constant memory. An id in `eos` (an empty list for none) ends
    the text and is the last one yielded. What is not given is the checkpoint's generation_config.json, or
    else greedy. `seed` makes sampling repeatable; see `GenerationConfig` for the rest.

    The last token yielded is not in the cache yet: begin the next call's tokens with it. After an exception
    or Ctrl-C, `cache.seen` says how far the stream came, and the cache can be used on.

    Raises ValueError for tokens outside the vocabulary or none at all, and for settings out of range;
    UnsupportedConfig where generation_config.json asks for what is not done here; TypeError for tokens that
    are no whole numbers.
    """
    ids = _ids(tokens)
    if not ids:
        raise ValueError("there are no tokens to begin with: give a prompt, or a BOS token")
    cache = SinkCache(model) if cache is None else cache
    config = settings(
        model,
        generation_config,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos=eos,
    )
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


def settings(
    model: nn.Module,
    config: GenerationConfig | None,
    *,
    eos: Sequence[int] | int | None,
    **given: float | None,
) -> GenerationConfig:
    """What the call gives, over what the checkpoint says, over the defaults."""
    if config is None:
        config = attached(model)
    if config.unsupported:
        raise UnsupportedConfig(
            f"generation_config.json asks for {', '.join(config.unsupported)}, which is not done here; "
            f"pass a generation_config of your own to generate without"
        )
    ends = None if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return config.override(eos=ends, **given)


class Loop:
    """One stream between a model and its cache: what is fed, what is still to be fed, and the last logits.

    It can be interrupted anywhere, and run on: `unfed` is what the cache has not taken in yet.

    A device that works through a queue (`AHEAD`) never waits for the host: a token is fed to the next forward
    where it was chosen, and only then read. The cache steps back from that forward before the token is said,
    and on again when the next one is asked for. So whoever stops, looks or does something else between two
    tokens finds all as if nothing had run ahead.
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
        self.said: Tensor | None = None  # the same as bool [V], once the repetition penalty asks
        self._ahead: _Ahead | None = None  # the forward of `unfed`, where that is one token, run already

    def push(self, tokens: Sequence[int], there: Tensor | None = None) -> None:
        """Tokens to take in before the next one is chosen. `there`: the same, int64, on the device already.

        Raises ValueError for ids that the model lacks.
        """
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside the model's vocabulary of 0 … {self.vocab_size - 1}"
            )
        self.unfed.extend(tokens)
        self.past.update(tokens)
        if self.said is not None:
            with torch.inference_mode():
                if there is None:
                    there = torch.tensor(list(tokens), dtype=torch.int64, device=self.cache.device)
                self.said.index_fill_(0, there, True)

    def feed(self) -> None:
        """Let the cache take in what is still to be fed."""
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
            if self.logits is None and taken == len(self.unfed):  # Ctrl-C while the logits were on their way
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
        """Push `tokens`, feed and choose, until an eos token or `max_new_tokens`; what is chosen is pushed.

        Raises ValueError before anything is pushed.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or above, or None for no end, not {max_new_tokens}")
        if seed is not None and not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seed must be a whole number of 64 bits, not {seed}")
        if not tokens and not self.unfed and self.logits is None:
            raise ValueError("there is nothing to go on from: give a prompt")
        self.push(tokens)
        generator = None
        if seed is not None:
            generator = torch.Generator(self.cache.device).manual_seed(seed)
        return self._tokens(config, max_new_tokens, generator)

    def _tokens(
        self, config: GenerationConfig, max_new_tokens: int | None, generator: torch.Generator | None
    ) -> Iterator[int]:
        if config.repetition_penalty != 1.0 and self.said is None:
            with torch.inference_mode():
                self.said = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.cache.device)
                self.said[list(self.past)] = True
        done = 0
        failed: BaseException | None = None
        while max_new_tokens is None or done < max_new_tokens:
            if failed is not None:  # in its turn: what is said and fed is then what it is without AHEAD
                self.logits = None
                raise failed
            self.feed()
            done += 1
            if self.cache.device.type in AHEAD and done != max_new_tokens:
                token, failed = self._choose_and_run_ahead(config, generator)
            else:
                token = self._choose(config, generator)
            try:
                yield token
            finally:
                if failed is not None and not isinstance(failed, Exception):
                    raise failed  # Ctrl-C is never lost, not even on one who wants no more tokens
            if token in config.eos:
                return

    def _choose(self, config: GenerationConfig, generator: torch.Generator | None) -> int:
        assert self.logits is not None
        with torch.inference_mode():
            token = next_token(self.logits, config, generator, self.said)
        self.push([token])
        return token

    def _choose_and_run_ahead(
        self, config: GenerationConfig, generator: torch.Generator | None
    ) -> tuple[int, BaseException | None]:
        """The next token, pushed, and what went wrong with feeding it, if anything did."""
        assert self.logits is not None
        before = int(self.cache.seen[0])
        ahead: _Ahead | None = None
        failed: BaseException | None = None
        with torch.inference_mode():
            token, best = choose(self.logits, config, generator, self.said)
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
    """A forward that ran before anybody asked for it."""

    logits: Tensor  # [V]
    back: object  # how the cache came back from it


class _Answer:
    """Numbers on their way to the host. What the device was told to do after them is not waited for."""

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
