"""Streaming against re-computation, prediction by prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamllm.evaluate.predictions import new_cache, recomputed_nll, stream_nll
from streamllm.evaluate.result import perplexity_of
from streamllm.evaluate.scoring import check_arguments, random_predictions


@dataclass(frozen=True)
class Comparison:
    """Streaming against re-computation at the same predictions; nats per token."""

    sinks: int
    window: int
    tokens: int  # predictions compared
    streaming: float  # mean nll
    recompute: float
    difference: float  # mean of streaming - recompute
    spread: float  # standard deviation of that difference between predictions
    eighths: tuple[float, ...]  # the mean difference in each eighth of the text, which would show a drift

    @property
    def error(self) -> float:
        """Standard error of `difference`."""
        return self.spread / math.sqrt(self.tokens)

    @property
    def ratio(self) -> float:
        """Perplexity of streaming divided by that of re-computation."""
        return perplexity_of(self.difference)


def compare(
    model: nn.Module,
    tokens: Tensor,
    *,
    sinks: int = 4,
    window: int | None = None,
    positions: int = 2000,
    seed: int = 0,
    chunk: int = 256,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Score one text [N] as a stream and by re-computation, at the same random positions past the window.

    Both see the same S + W tokens. They differ in what the kept keys had seen when they were computed; not
    computing them again is what streaming saves. Before the first eviction both are equal, so no position is
    drawn from there. `progress` is called with (done, total) tokens and predictions. Raises ValueError as
    `perplexity` does, and for a text of at most S + W + 1 tokens.
    """
    tokens = tokens.cpu()
    check_arguments([tokens], "sinks", chunk=chunk, batch=batch, positions=positions)
    cache = new_cache(model, "sinks", sinks, window, chunk)
    span, last = sinks + cache.window, len(tokens) - 1
    if last <= span:
        raise ValueError(f"{len(tokens)} tokens do not outgrow sinks + window = {span}: give a longer text")
    places = span + random_predictions(last - span, positions, seed)
    total = last + len(places)
    kept: list[Tensor] = []
    for passed, nll in stream_nll(model, tokens, cache, chunk):
        kept.append(nll[torch.isin(passed, places)])
        if progress is not None:
            progress(int(passed[-1]) + 1, total)
    streamed, recomputed = torch.cat(kept), torch.empty(len(places), dtype=torch.float64, device="cpu")
    done = 0
    for _, nll in recomputed_nll(model, tokens, places, sinks, cache.window, batch, chunk):
        recomputed[done : done + len(nll)] = nll
        done += len(nll)
        if progress is not None:
            progress(last + done, total)
    difference = streamed - recomputed
    eighth = (places * 8).div(last, rounding_mode="floor")
    return Comparison(
        sinks=sinks,
        window=cache.window,
        tokens=len(places),
        streaming=float(streamed.mean()),
        recompute=float(recomputed.mean()),
        difference=float(difference.mean()),
        spread=float(difference.std()) if len(places) > 1 else math.nan,
        eighths=tuple(float(difference[eighth == part].mean()) for part in range(8)),
    )
