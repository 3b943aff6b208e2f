"""Sampler: what the settings of one stream change in its logits, from its history; and `sample` for many streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from streamllm.generation_config import GenerationConfig
from streamllm.sampling.counters import NgramCounts, TokenCounts
from streamllm.sampling.dry import RepeatedSuffixes, dry_penalties, single_token_breakers
from streamllm.sampling.edits import NO_IDS, NO_VALUES, Edits, Ids, Values, apply_edits
from streamllm.sampling.history import History
from streamllm.sampling.random_numbers import fresh_seed, uniform
from streamllm.sampling.rows import RowSettings, choose_rows

# The last tokens of the stream, oldest first, and float32 logits [V], to logits [V].
LogitsProcessor = Callable[[list[int], Tensor], Tensor]


class Sampler:
    """The settings of one stream, prepared for its vocabulary and window. It holds no state of the stream.

    The logits go through these steps, in the order of transformers where it has them: logit_bias,
    repetition_penalty, frequency_penalty and presence_penalty, no_repeat_ngram_size, bad_words_ids,
    min_new_tokens, suppress_tokens, begin_suppress_tokens, DRY, `logits_processor`; then, when sampling,
    temperature, top_k, top_p, min_p.

    Args:
        window: how many tokens the penalties and no_repeat_ngram_size look back where repeat_last_n is None, and
            DRY where dry_penalty_last_n is None.
        seed: None draws one from torch's global generator. `sampler.seed` is the seed in use.
        breakers: the token sequences that interrupt a repetition for DRY; see `breaker_tokens`.
        logits_processor: is called with `window` tokens, or fewer at the start of a stream.

    Raises:
        ValueError: a token id of a setting is outside the vocabulary.
    """

    def __init__(
        self,
        config: GenerationConfig,
        *,
        vocab_size: int,
        window: int,
        seed: int | None = None,
        breakers: Sequence[tuple[int, ...]] = (),
        logits_processor: LogitsProcessor | None = None,
    ) -> None:
        self.config = config
        self.seed = fresh_seed() if seed is None else seed
        self.logits_processor = logits_processor
        self._window = window
        self._last_n = _range(config.repeat_last_n, window)
        self._dry_last_n = _range(config.dry_penalty_last_n, window) if config.dry_multiplier else 0
        self._breakers = tuple(sorted(set(breakers)))
        self._exempt = single_token_breakers(self._breakers)
        eos = {(token,) for token in config.eos}
        bad_words = [word for word in config.bad_words_ids if word not in eos]  # as in transformers
        for name, tokens in (
            ("logit_bias", [token for token, _ in config.logit_bias]),
            ("bad_words_ids", [token for word in bad_words for token in word]),
            ("suppress_tokens", config.suppress_tokens),
            ("begin_suppress_tokens", config.begin_suppress_tokens),
        ):
            _check_tokens(name, tokens, vocab_size)
        # A forbidden token stays so through all steps, so what is always forbidden can be the first step.
        bias = dict(config.logit_bias)
        bias.update((word[0], -np.inf) for word in bad_words if len(word) == 1)
        bias.update((token, -np.inf) for token in config.suppress_tokens)
        self._bias = _arrays(bias)
        self._bad_words: dict[int, dict[tuple[int, ...], set[int]]] = {}  # by the length of their beginning
        for word in bad_words:
            if len(word) > 1:
                self._bad_words.setdefault(len(word) - 1, {}).setdefault(word[:-1], set()).add(word[-1])
        self._eos = [token for token in config.eos if token < vocab_size]
        self._counts_tokens = self._last_n > 0 and (
            config.repetition_penalty != 1 or config.presence_penalty != 0 or config.frequency_penalty != 0
        )

    @property
    def needs(self) -> int:
        """How many of the last tokens of a history it looks at."""
        return max(1, self._window, self._last_n, self._dry_last_n, *self._bad_words)

    def edits(self, history: History, generated: int) -> Edits:
        """What changes in the next logits.

        generated: how many tokens this call has generated, for min_new_tokens and begin_suppress_tokens.
        """
        config = self.config
        seen, subtracted = NO_IDS, NO_VALUES
        if self._counts_tokens:
            counts = history.counter(TokenCounts, self._last_n)
            seen = counts.tokens
            subtracted = (config.presence_penalty + config.frequency_penalty * counts.counts).astype(
                np.float32
            )
        late = dict.fromkeys(self._forbidden(history, generated), -np.inf)
        if self._dry_last_n:
            repeats = history.counter(RepeatedSuffixes, self._dry_last_n, self._breakers)
            for token, penalty in dry_penalties(
                repeats, config.dry_multiplier, config.dry_base, config.dry_allowed_length, self._exempt
            ):
                late[token] = late.get(token, 0.0) - penalty
        return Edits(*self._bias, seen, config.repetition_penalty, subtracted, *_arrays(late))

    def process(self, scores: Tensor, history: History) -> Tensor:
        """The logits, float32 [V], after the logits_processor.

        Raises ValueError where it does not return logits [V] on the same device.
        """
        if self.logits_processor is None:
            return scores
        result = self.logits_processor(history.last(self._window), scores)
        if not isinstance(result, Tensor) or result.shape != scores.shape or result.device != scores.device:
            given = (
                f"a tensor of shape {list(result.shape)} on {result.device}"
                if isinstance(result, Tensor)
                else type(result).__name__
            )
            raise ValueError(
                f"logits_processor returned {given}: it must return logits of shape {list(scores.shape)} "
                f"on {scores.device}"
            )
        return result.float()

    def _forbidden(self, history: History, generated: int) -> Iterator[int]:
        config = self.config
        if config.no_repeat_ngram_size and self._last_n:
            yield from history.counter(NgramCounts, self._last_n, config.no_repeat_ngram_size).following()
        for length, words in self._bad_words.items():
            yield from words.get(tuple(history.last(length)), ())
        if generated < config.min_new_tokens:
            yield from self._eos
        if generated == 0:
            yield from config.begin_suppress_tokens


def sample(
    logits: Tensor,
    samplers: Sequence[Sampler],
    rows: RowSettings,
    histories: Sequence[History],
    places: Sequence[int],
    generated: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The next token of each of B streams, int64 [B], and the best score of each, float32 [B], for `check_finite`.

    Both stay on the device of the logits, [B, V], and the device is not waited for, but by a logits_processor. A row's
    token is the one that it would get alone.

    rows: `RowSettings` of the samplers' configs. places: the index in its stream of the token to draw, which with
    the seed makes the random number. generated: see `Sampler.edits`.
    """
    scores = apply_edits(
        logits,
        [
            sampler.edits(history, count)
            for sampler, history, count in zip(samplers, histories, generated, strict=True)
        ],
    )
    if any(sampler.logits_processor is not None for sampler in samplers):
        scores = torch.stack(
            [
                sampler.process(row, history)
                for sampler, row, history in zip(samplers, scores, histories, strict=True)
            ]
        )
    chance: Tensor | float = 0.0
    if rows.samples:
        chances = [uniform(sampler.seed, place) for sampler, place in zip(samplers, places, strict=True)]
        chance = chances[0] if len(chances) == 1 else torch.tensor(chances, dtype=torch.float64, device="cpu")
    return choose_rows(scores, rows, chance)


def _range(last_n: int | None, window: int) -> int:
    return window if last_n is None or last_n < 0 else last_n


def _arrays(values: dict[int, float]) -> tuple[Ids, Values]:
    if not values:
        return NO_IDS, NO_VALUES
    return np.array(list(values), np.int64), np.array(list(values.values()), np.float32)


def _check_tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"{name} names token {wrong[0]}, outside the model's vocabulary of 0 … {vocab_size - 1}"
        )
