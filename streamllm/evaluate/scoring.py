"""How well a model predicts a long text, under four ways of attending to it.

    sinks      each token sees the first S tokens and the last W (Xiao et al., arXiv 2309.17453, section 3.2)
    window     the last W only: the same stream with S = 0
    dense      everything before it: the same stream with a window as long as the text
    recompute  for every token a fresh dense forward over the first S and the last W tokens; slow, and the
               quality that the others are measured against (the paper's baseline has S = 0)

The window counts the token itself: the paper's "4 + 1020", which evicts after the forward, is sinks=4,
window=1021 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.evaluate.predictions import new_cache, recomputed_nll, stream_nll
from streamllm.evaluate.result import Result
from streamllm.evaluate.saving import continued_cache

MODES = ("sinks", "window", "dense", "recompute")


def perplexity(
    model: nn.Module,
    tokens: Tensor | Sequence[Tensor],
    *,
    mode: str = "sinks",
    sinks: int = 4,
    window: int | None = None,
    chunk: int = 256,
    every: int = 1,
    positions: int | None = None,
    seed: int = 0,
    batch: int = 32,
    quantize: str | None = None,
    resume: Result | None = None,
    progress: Callable[[Result], None] | None = None,
) -> Result:
    """Negative log-likelihood of a text, int64 [N], or of several texts, each from an empty cache.

    `mode` is one of MODES; `sinks` and `window` are as for SinkCache (window=None: what the model was trained
    for, at most 4092). "window" takes 0 for the sinks, "dense" the longest text for the window. The value
    does not depend on `chunk`, because a chunk of tokens is exact. Logits exist for one chunk at a time, so
    memory does not depend on the length of the text (except in dense mode, whose cache holds it).
    "recompute" costs S + W tokens for each prediction, computed `batch` at a time. `quantize` is as for
    SinkCache; "recompute", which stores nothing, ignores it.

    `every` scores only every n-th prediction; `positions` only so many at random (`seed`), the same ones in
    every mode. `progress` is called with the score so far after each chunk. To continue an interrupted run,
    give the last of these as `resume`, with the same arguments: the totals are then the same to the last bit.
    `save` and `load` write one to a file and read it.

    Raises ValueError for an unknown mode, a text of fewer than two tokens, numbers out of range, and a
    `resume` that belongs to another run or whose cache has moved on.
    """
    texts = [text.cpu() for text in ([tokens] if isinstance(tokens, Tensor) else tokens)]
    check_arguments(texts, mode, chunk=chunk, every=every, batch=batch)
    counts = [len(text) - 1 for text in texts]
    if mode in ("window", "dense"):
        sinks = 0
    if mode == "recompute":
        quantize = None
    if mode == "dense":
        window = max(counts) + 1
    elif window is None:
        window = new_cache(model, mode, sinks, None, chunk, quantize=quantize).window
    chosen = _chosen_predictions(sum(counts), every, positions, seed)
    total = sum(counts) if chosen is None else len(chosen)
    blank = Result(mode, sinks, window, 0.0, 0, total, (), quantize=quantize)
    result = blank if resume is None else resume
    if (result.mode, result.sinks, result.window, result.quantize, result.total) != (
        mode, sinks, window, quantize, total,
    ):  # fmt: skip
        raise ValueError(f"cannot continue a run with other settings: {result} is not {blank}")

    while result.text < len(texts):
        text, first = texts[result.text], sum(counts[: result.text])
        inside = (
            None if chosen is None else chosen[(chosen >= first) & (chosen < first + len(text) - 1)] - first
        )
        cache: SinkCache | None = None
        pieces: Iterator[tuple[Tensor, Tensor]]
        if mode == "recompute":
            left = torch.arange(len(text) - 1, dtype=torch.int64, device="cpu") if inside is None else inside
            pieces = recomputed_nll(model, text, left[left >= result.place], sinks, window, batch, chunk)
        else:
            cache = continued_cache(result, chunk)
            cache = cache or new_cache(model, mode, sinks, window, chunk, quantize=quantize)
            pieces = stream_nll(model, text, cache, chunk)
        for places, nll in pieces:
            done = int(places[-1]) + 1
            if inside is not None and cache is not None:
                kept = torch.isin(places, inside)
                places, nll = places[kept], nll[kept]
            result = replace(result.with_predictions(places + 1, nll), place=done, cache=cache)
            if progress is not None and done < len(text) - 1:
                progress(result)
        result = replace(result, text=result.text + 1, place=0, cache=None)
        if progress is not None:
            progress(result)
    return result


def check_arguments(texts: Sequence[Tensor], mode: str, **numbers: int) -> None:
    """Raise ValueError for an unknown mode, a number below 1, and texts that are not ids [N] with N ≥ 2."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not texts:
        raise ValueError("there is no text to score")
    for text in texts:
        if text.dim() != 1 or len(text) < 2 or text.is_floating_point():
            raise ValueError(
                f"a text must be token ids [N], N at least 2, not {text.dtype} of shape {list(text.shape)}"
            )


def random_predictions(total: int, count: int, seed: int) -> Tensor:
    """`count` different indices below `total`, or all where there are fewer; ascending, int64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(total, generator=generator, dtype=torch.int64, device="cpu")[:count]
    return chosen.sort().values


def _chosen_predictions(total: int, every: int, positions: int | None, seed: int) -> Tensor | None:
    """The indices of the predictions that are scored, ascending; None: all of `total`."""
    if positions is not None and every != 1:
        raise ValueError("give every or positions, not both")
    if positions is not None:
        if positions < 1:
            raise ValueError(f"positions must be at least 1, not {positions}")
        return random_predictions(total, positions, seed)
    return None if every == 1 else torch.arange(0, total, every, dtype=torch.int64, device="cpu")
