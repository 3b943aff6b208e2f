"""generate(): the loop from tokens to tokens, one stream, without end unless told."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.models.step import geometry_of
from streamllm.sampling import GenerationConfig, attached, next_token
from streamllm.weights.errors import UnsupportedConfig


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
    return config.but(eos=ends, **given)


class Loop:
    """One stream between a model and its cache: what is fed, what is still to be fed, and the last logits.

    It can be interrupted anywhere, and run on: `unfed` is what the cache has not taken in yet.
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

    def push(self, tokens: Sequence[int]) -> None:
        """Tokens to take in before the next one is chosen. Raises ValueError for ids that the model lacks."""
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside the model's vocabulary of 0 … {self.vocab_size - 1}"
            )
        self.unfed.extend(tokens)
        self.past.update(tokens)
        if self.said is not None:
            with torch.inference_mode():
                self.said[list(tokens)] = True

    def feed(self) -> None:
        """Let the cache take in what is still to be fed."""
        if not self.unfed:
            return
        before = int(self.cache.seen[0])
        self.logits = None
        try:
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
        while max_new_tokens is None or done < max_new_tokens:
            self.feed()
            assert self.logits is not None
            with torch.inference_mode():
                token = next_token(self.logits, config, generator, self.said)
            self.push([token])
            done += 1
            yield token
            if token in config.eos:
                return
