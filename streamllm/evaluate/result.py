"""The score of a model on a text: negative log-likelihood, by position.

The *position* of a prediction is the index of the token that is predicted, which is the number of tokens
before it. A text of N tokens has N - 1 predictions, at the positions 1 … N-1; the prediction at position p is
computed from token p-1. Scores are in nats, summed in float64.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamllm.cache import SinkCache


class _Score:
    """Mean and perplexity of scored predictions; NaN where there are none."""

    nll: float  # nats, summed over the scored predictions
    tokens: int  # predictions scored

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.mean)


@dataclass(frozen=True)
class Bucket(_Score):
    """The scored predictions at the positions start … stop-1."""

    start: int
    stop: int
    nll: float
    tokens: int


@dataclass(frozen=True)
class Result(_Score):
    """The settings of a run and its score so far: plain data, and the cache that an unfinished run needs."""

    mode: str
    sinks: int
    window: int  # recent keys, including the token's own; in dense mode the length of the longest text
    nll: float
    tokens: int
    total: int  # predictions to be scored
    buckets: tuple[Bucket, ...]  # by position, between powers of two
    text: int = 0  # index of the next text
    place: int = 0  # predictions of that text that are done
    quantize: str | None = None  # as for SinkCache
    cache: SinkCache | None = field(default=None, repr=False, compare=False)  # None between texts

    @property
    def done(self) -> bool:
        return self.tokens == self.total

    def between(self, start: int, stop: float) -> Bucket:
        """All buckets whose first position is in start … stop-1, as one."""
        chosen = [bucket for bucket in self.buckets if start <= bucket.start < stop]
        return Bucket(
            min((bucket.start for bucket in chosen), default=start),
            max((bucket.stop for bucket in chosen), default=start),
            sum(bucket.nll for bucket in chosen),
            sum(bucket.tokens for bucket in chosen),
        )

    def beyond(self, position: int) -> Bucket:
        """All buckets that start at `position` or later, as one."""
        return self.between(position, math.inf)

    def with_predictions(self, positions: Tensor, nll: Tensor) -> Result:
        """The score with more predictions: positions int64 [n], nll float64 [n]."""
        power = torch.frexp(positions.double()).exponent.long() - 1  # position 2^k … 2^(k+1)-1 -> k
        size = max(len(self.buckets), int(power.max()) + 1 if len(power) else 0)
        sums = torch.bincount(power, nll, minlength=size).tolist()
        counts = torch.bincount(power, minlength=size).tolist()
        new = tuple(Bucket(1 << k, 2 << k, 0.0, 0) for k in range(len(self.buckets), size))
        return replace(
            self,
            nll=self.nll + float(nll.sum()),
            tokens=self.tokens + len(nll),
            buckets=tuple(
                replace(bucket, nll=bucket.nll + more, tokens=bucket.tokens + count)
                for bucket, more, count in zip((*self.buckets, *new), sums, counts, strict=True)
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with mean and perplexity (None where not finite) and without the cache."""
        plain = asdict(replace(self, cache=None))
        del plain["cache"]
        scored: tuple[Result | Bucket, ...] = (self, *self.buckets)
        for entry, score in zip((plain, *plain["buckets"]), scored, strict=True):
            entry["mean"] = score.mean if math.isfinite(score.mean) else None
            entry["perplexity"] = score.perplexity if math.isfinite(score.perplexity) else None
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> Result:
        """The inverse of `to_dict`."""
        known = {name: value for name, value in plain.items() if name not in ("mean", "perplexity")}
        buckets = (
            Bucket(entry["start"], entry["stop"], entry["nll"], entry["tokens"]) for entry in plain["buckets"]
        )
        return Result(**{**known, "buckets": tuple(buckets)})


def perplexity_of(mean: float) -> float:
    """exp(mean), infinite where a float cannot hold it."""
    return math.inf if mean > 700 else math.exp(mean)
