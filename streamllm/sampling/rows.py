"""One token for each row of a batch of logits: temperature, top-k, top-p, min-p, and the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streamllm.generation_config import GenerationConfig

# On a CPU, so many of the likeliest tokens nearly always hold all the probability that top-p or min-p asks for.
CANDIDATES = 256
FLOAT32 = torch.finfo(torch.float32)


class RowSettings:
    """The temperature, top_k, top_p and min_p of B rows, as tensors [B, 1] on a device.

    Make it once for rows that stay together, not for every token.
    """

    def __init__(self, configs: Sequence[GenerationConfig], device: torch.device | str) -> None:
        # A number that never cuts stands for "off": rows that use a setting and rows that do not are one tensor.
        greedy = [config.temperature == 0 for config in configs]
        table = torch.tensor(
            [
                (
                    # float32 would round a temperature under 1e-45 to 0, and one above 3e38 to infinity
                    min(max(config.temperature, FLOAT32.tiny), FLOAT32.max) if config.temperature else 1.0,
                    config.top_k or math.inf,
                    config.top_p if config.top_p < 1 else math.inf,
                    config.min_p,
                )
                for config in configs
            ],
            dtype=wide_dtype(torch.device(device)),
            device="cpu",
        ).to(device, non_blocking=True)
        self.temperature = table[:, 0:1].float()
        self.top_k = table[:, 1:2]
        self.top_p = table[:, 2:3]
        self.min_p = table[:, 3:4].float()
        self.greedy = torch.tensor(greedy, dtype=torch.bool, device="cpu").to(device, non_blocking=True)[
            :, None
        ]
        # What the host needs to know to skip work
        sampled = [config for config in configs if config.temperature > 0]
        self.samples = bool(sampled)
        self.any_greedy = any(greedy)
        self.largest_top_k = max((config.top_k for config in sampled), default=0)
        self.cuts_top_p = any(config.top_p < 1 for config in sampled)
        self.cuts_min_p = any(config.min_p > 0 for config in sampled)

    def __len__(self) -> int:
        return len(self.temperature)

    def select(self, rows: Tensor) -> RowSettings:
        """The settings of some rows, int64 [n]."""
        chosen = object.__new__(RowSettings)
        chosen.__dict__.update(self.__dict__)
        for name in ("temperature", "top_k", "top_p", "min_p", "greedy"):
            setattr(chosen, name, getattr(self, name)[rows])
        return chosen


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of cumulative probabilities: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def choose_rows(scores: Tensor, settings: RowSettings, chance: Tensor | float) -> tuple[Tensor, Tensor]:
    """A token for each row of `scores`, float32 [B, V]: int64 [B]; and the best score of each row, [B].

    Both stay on the device, which is not waited for (a CPU's values are read). Where the best score is not
    finite, the token means nothing: see `check_finite`.

    chance: for each row a number in [0, 1), [B], as `uniform` gives it; or one number for a single row. The token is
    the one at which the cumulative probability of the kept tokens, in the order of their ids, exceeds it. A row's
    token depends on its own scores, settings and number alone.
    """
    best, likeliest = scores.max(-1, keepdim=True)
    if not settings.samples:
        return likeliest[:, 0], best[:, 0]
    if scores.device.type == "mps":
        chance = _below_one(chance)
    if isinstance(chance, Tensor):
        chance = chance.to(scores.device, wide_dtype(scores.device), non_blocking=True)[:, None]
    # Subtract the best before dividing: a small temperature would overflow the scores themselves.
    scores = (scores - best) / settings.temperature
    if not (settings.largest_top_k or settings.cuts_top_p or settings.cuts_min_p):
        tokens = draw(scores, chance)
    elif scores.device.type == "cpu":
        tokens = _draw_on_the_cpu(scores, settings, chance)
    else:
        tokens = draw(_cut(scores, settings), chance)
    if settings.any_greedy:
        tokens = torch.where(settings.greedy, likeliest, tokens)
    return tokens[:, 0], best[:, 0]


def check_finite(best: float) -> None:
    """Raises ValueError where the best logit is not finite: no token is allowed, or the model's numbers are wrong."""
    if best == -math.inf:
        raise ValueError(
            "every token is forbidden: allow some in logit_bias, bad_words_ids, suppress_tokens, no_repeat_ngram_size "
            "and logits_processor; without any of these, the model's logits are not finite"
        )
    if not math.isfinite(best):
        raise ValueError(
            f"the model's logits are not finite ({best:g}): in float16 take bfloat16 or float32 instead; "
            f"else its weights are damaged"
        )


def draw(scores: Tensor, chance: Tensor | float) -> Tensor:
    """Draws an index of each row of the scores by inverse CDF, with one random number for each: int64 [B, 1].

    The best of the scores, [B, n], is 0. Scores of -inf change nothing.
    """
    reached = scores.to(wide_dtype(scores.device)).exp().cumsum(-1)
    index = torch.searchsorted(reached, reached[:, -1:] * chance, right=True)
    return index.clamp(max=scores.shape[-1] - 1)  # NaN scores still give a valid id; the caller raises later


def _draw_on_the_cpu(scores: Tensor, settings: RowSettings, chance: Tensor | float) -> Tensor:
    """As `draw(_cut(...))`, but sorts all tokens only of the rows that need it."""
    values, tokens, short = _cut_candidates(scores, settings)
    drawn = tokens.gather(-1, draw(values, chance))
    if short is not None and short.any():
        rows = short.nonzero()[:, 0]
        other = chance[rows] if isinstance(chance, Tensor) else chance
        drawn[rows] = draw(_cut(scores[rows], settings.select(rows)), other)
    return drawn


def _cut(scores: Tensor, settings: RowSettings) -> Tensor:
    """The scores, [B, V], with -inf for the tokens that top-k, top-p and min-p leave out."""
    ranked, tokens = scores.sort(descending=True, stable=True)
    total = ranked.exp().sum(-1, keepdim=True, dtype=wide_dtype(scores.device))
    kept = _kept(ranked, total, settings)
    return scores.masked_fill(~torch.zeros_like(kept).scatter(-1, tokens, kept), -torch.inf)


def _cut_candidates(scores: Tensor, settings: RowSettings) -> tuple[Tensor, Tensor, Tensor | None]:
    """The likeliest tokens alone: their scores as `_cut` gives them, [B, n], and the tokens in the order of ids.

    Also, bool [B], the rows of which more tokens may be kept; None if these are all the tokens.
    """
    count = min(max(CANDIDATES, settings.largest_top_k), scores.shape[-1])
    tokens = scores.topk(count).indices.sort().values
    values = scores.gather(-1, tokens)
    ranked, order = values.sort(descending=True, stable=True)
    total = scores.exp().sum(-1, keepdim=True, dtype=torch.float64) if settings.cuts_top_p else ranked
    kept = _kept(ranked, total, settings)
    short = None
    if count < scores.shape[-1]:  # a token that is not a candidate may be as likely as the last one kept
        last_kept = ranked.gather(-1, (kept.sum(-1, keepdim=True) - 1).clamp(min=0))
        short = ~(ranked[:, -1] < last_kept[:, 0])
    return values.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf), tokens, short


def _kept(ranked: Tensor, total: Tensor, settings: RowSettings) -> Tensor:
    """Which of the ranked scores [B, n] top-k, top-p and min-p keep, in this order: bool [B, n].

    The ranked scores may be the best of more. total, [B, 1]: the sum of exp over all of them, for top-p.
    """
    weights = ranked.exp()
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if settings.largest_top_k:
        index = (settings.top_k - 1).clamp(max=ranked.shape[-1] - 1).long()
        kept = ranked >= ranked.gather(-1, index)  # and the ties with the k-th
    if settings.cuts_top_p:  # a token stays while the tokens before it have less than top_p
        wide = weights.to(wide_dtype(ranked.device))
        if settings.largest_top_k:
            total = torch.where(settings.top_k.isfinite(), (wide * kept).sum(-1, keepdim=True), total)
        kept = kept & (wide.cumsum(-1) - wide < settings.top_p * total)
    if settings.cuts_min_p:
        kept = kept & (weights >= settings.min_p)  # the best weight is 1
    return kept


def _below_one(chance: Tensor | float) -> Tensor | float:
    """Rounded down to 24 bits: float32 would round the largest numbers to 1."""
    return (
        (chance * 2.0**24).floor() * 2.0**-24
        if isinstance(chance, Tensor)
        else int(chance * 2**24) * 2.0**-24
    )
