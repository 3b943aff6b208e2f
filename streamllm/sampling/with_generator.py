"""One token from one row of logits, with a torch generator for the random number."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from streamllm.generation_config import GenerationConfig
from streamllm.sampling.rows import RowSettings, check_finite, choose_rows, wide_dtype


def next_token(
    logits: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None,
    seen_tokens: Tensor | None = None,
) -> int:
    """As `choose`, on the host. Raises ValueError where a logit is not finite."""
    token, best = choose(logits, config, generator, seen_tokens)
    check_finite(float(best))
    return int(token)


def choose(
    logits: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None,
    seen_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next token, int64 [1], from logits [V]; and the best logit, [1], for `check_finite`.

    Both stay on the device, which is not waited for. Where the best logit is not finite, the token means nothing.
    seen_tokens, bool [V]: the tokens that the repetition penalty applies to.
    """
    scores = _penalised(logits, config, seen_tokens)[None]
    chance: Tensor | float = 0.0
    if config.temperature:
        chance = torch.rand(1, generator=generator, dtype=wide_dtype(logits.device), device=logits.device)
    return choose_rows(scores, _row(config, logits.device), chance)


@lru_cache(maxsize=16)
def _row(config: GenerationConfig, device: torch.device) -> RowSettings:
    return RowSettings([config], device)


def _penalised(logits: Tensor, config: GenerationConfig, seen_tokens: Tensor | None) -> Tensor:
    scores = logits.float()
    if seen_tokens is None or config.repetition_penalty == 1.0:
        return scores
    penalty = config.repetition_penalty
    return torch.where(seen_tokens, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
