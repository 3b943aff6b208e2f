"""generate(): the loop from tokens to tokens, for one stream, without an end unless one is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.generation_config import GenerationConfig, SamplingSettings, resolve
from streamllm.loop import Loop
from streamllm.models.checks import whole_number
from streamllm.models.step import geometry_of
from streamllm.sampling import LogitsProcessor, Sampler, breaker_tokens
from streamllm.tensor_parallel import agreed_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def generate(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    cache: SinkCache | None = None,
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    logits_processor: LogitsProcessor | None = None,
    generation_config: GenerationConfig | None = None,
    **settings: Unpack[SamplingSettings],
) -> Iterator[int]:
    """The tokens that follow `tokens` (ids, [T] or [1, T]) in the stream that `cache` holds, one by one.

    `max_new_tokens=None` goes on forever, in constant memory. `seed` makes sampling repeatable: the random number of
    a token depends on the seed and on the token's number in the stream, and on nothing else. `logits_processor`
    is called with the last tokens and the logits [V] in float32, and returns logits. The settings temperature,
    top_k, top_p, eos and so on are those of `GenerationConfig`. Those that are not given are the checkpoint's
    (generation_config.json), or greedy. An id in `eos` (an empty list for none) ends the text, and is the last one
    yielded.

    The last token yielded is not in the cache yet: begin the next call's tokens with it. After an exception
    or Ctrl-C, `cache.seen` tells how far the stream came, and the cache can be used again.

    Raises ValueError for an empty list of tokens, for tokens outside the vocabulary and for settings out of
    range; UnsupportedConfig where generation_config.json asks for what is not supported; TypeError for tokens
    that are not whole numbers and for unknown settings.
    """
    ids = token_ids(tokens)
    if not ids:
        raise ValueError("there are no tokens to begin with: give a prompt, or a BOS token")
    max_new_tokens = check_max_new_tokens(max_new_tokens)
    config = resolve(model, generation_config, settings)
    cache = SinkCache(model) if cache is None else cache
    loop = Loop(model, cache)
    sampler = make_sampler(
        loop, ids, config, seed, logits_processor, breaker_tokens(None, config.dry_sequence_breakers)
    )
    loop.push(ids)
    return _generated(loop, sampler, max_new_tokens)


def _generated(loop: Loop, sampler: Sampler, max_new_tokens: int | None) -> Iterator[int]:
    count = 0
    while max_new_tokens is None or count < max_new_tokens:
        loop.push_drawn()
        count += 1
        interrupt: BaseException | None = None
        try:
            token = loop.draw(sampler, count - 1, run_ahead=count != max_new_tokens)
        except BaseException as error:
            drawn = loop.drawn
            if drawn is None:
                loop.keep_last_unfed()
                raise
            token, interrupt = drawn, error  # Ctrl-C behind the token: it comes first
        try:
            yield token
        finally:
            if interrupt is not None:  # also where the caller wants no more tokens
                raise interrupt
        if token in sampler.config.eos:
            return


def make_sampler(
    loop: Loop,
    tokens: Sequence[int],
    config: GenerationConfig,
    seed: int | None,
    logits_processor: LogitsProcessor | None,
    breakers: Sequence[tuple[int, ...]],
) -> Sampler:
    """The sampler of one call that pushes `tokens`. Raises ValueError and TypeError, see `generate`."""
    if logits_processor is not None and not callable(logits_processor):
        raise TypeError(f"logits_processor must be a function or None, not {logits_processor!r}")
    sampler = Sampler(
        config,
        vocab_size=geometry_of(loop.model).vocab_size,
        window=loop.cache.sinks + loop.cache.window,
        seed=agreed_seed(loop.model, check_seed(seed), [*loop.unfed, *tokens]),
        breakers=breakers,
        logits_processor=logits_processor,
    )
    loop.log.history.grow(sampler.needs)
    return sampler


def token_ids(tokens: Sequence[int] | Tensor) -> list[int]:
    """The ids [T] or [1, T] as a list. Raises ValueError for another shape, TypeError for other types."""
    if isinstance(tokens, (str, bytes)):
        raise TypeError("tokens must be ids, not text: encode it, or use a Stream")
    if isinstance(tokens, Tensor):
        if tokens.dim() == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.dim() != 1:
            raise ValueError(f"tokens of one stream have the shape [T] or [1, T], not {list(tokens.shape)}")
        tokens = tokens.tolist()
    elif not isinstance(tokens, Iterable):
        raise TypeError(f"tokens must be a list of ids, not {tokens!r}")
    return [_token_id(token) for token in tokens]


def _token_id(token: object) -> int:
    try:
        return whole_number("a token id", token)
    except ValueError as error:
        raise TypeError(str(error)) from None


def check_max_new_tokens(value: int | None) -> int | None:
    """Raises ValueError."""
    return None if value is None else whole_number("max_new_tokens", value, 0)


def check_seed(value: int | None) -> int | None:
    """Raises ValueError."""
    return None if value is None else whole_number("seed", value, -(1 << 63), (1 << 64) - 1)
