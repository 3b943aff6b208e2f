"""From logits to the next token: pure functions and an explicit random generator, the same on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamllm.generation_config import GenerationConfig

# On a CPU, so many of the likeliest tokens nearly always hold all the probability that top-p or min-p asks for.
CANDIDATES = 256


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
    scores = _penalised(logits, config, seen_tokens)
    best, token = scores.max(-1, keepdim=True)
    if config.temperature == 0:
        return token, best
    # Subtract the best before dividing: a small temperature would overflow the scores themselves.
    scores = (scores - best) / config.temperature
    if not config.top_k and config.top_p == 1 and not config.min_p:
        return draw(scores, generator), best
    scores, tokens, total = _ranked(scores, config)
    scores = scores.masked_fill(~_kept(scores, total, config), -torch.inf)
    return tokens.gather(0, draw(scores, generator)), best


def check_finite(best: float) -> None:
    """Raises ValueError where the best logit is not finite, as of a model out of its precision."""
    if not math.isfinite(best):
        raise ValueError(
            f"the model's logits are not finite ({best:g}): in float16 take bfloat16 or float32 instead; "
            f"else its weights are damaged"
        )


def draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws an index of the scores by inverse CDF, with one random number: int64 [1].

    The best of the scores [n] is 0. Scores of -inf behind the others change nothing.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    reached = scores.to(wide).exp().cumsum(-1)
    chance = torch.rand(1, generator=generator, dtype=wide, device=scores.device)
    index = torch.searchsorted(reached, chance * reached[-1], right=True)
    return index.clamp(max=len(scores) - 1)  # NaN scores still give a valid id; the caller raises later


def _penalised(logits: Tensor, config: GenerationConfig, seen_tokens: Tensor | None) -> Tensor:
    scores = logits.float()
    if seen_tokens is None or config.repetition_penalty == 1.0:
        return scores
    penalty = config.repetition_penalty
    return torch.where(seen_tokens, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _ranked(scores: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The scores that may be kept, best first; their tokens; and the sum of exp over all scores.

    The best of the scores is 0. On a CPU, where values can be read, only as many are sorted as are needed.
    """
    total = scores.exp().sum(-1)
    if scores.device.type == "cpu":
        few, tokens = scores.topk(min(config.top_k or CANDIDATES, len(scores)))
        if config.top_k:  # and the ties with the k-th
            tokens = (~(scores < few[-1])).nonzero()[:, 0]  # all, where they are NaN
            few, order = scores[tokens].sort(descending=True, stable=True)
            return few, tokens[order], total
        cut_by_min_p = few[-1].exp() < config.min_p
        if cut_by_min_p or (config.top_p < 1 and few.exp().sum() >= config.top_p * total):
            return few, tokens, total
    scores, tokens = scores.sort(descending=True, stable=True)
    return scores, tokens, total


def _kept(scores: Tensor, total: Tensor, config: GenerationConfig) -> Tensor:
    """Which of the ranked scores [n] top-k, top-p and min-p keep, in this order: bool [n].

    total: the sum of exp over all scores, of which the ranked ones may be a part.
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    weights = scores.exp()
    if config.top_k:
        kept = scores >= scores[min(config.top_k, len(scores)) - 1]
        total = (weights * kept).sum(-1)
    if config.top_p < 1:  # a token stays while the tokens before it have less than top_p
        kept = kept & (weights.cumsum(-1) - weights < config.top_p * total)
    if config.min_p:
        kept = kept & (weights >= config.min_p)  # the best weight is 1
    return kept
