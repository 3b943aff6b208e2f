"""A model's predictions along a text: as a stream through a cache, or recomputed for each token.

The place of a prediction is the index of the token that it is computed from; it predicts the token after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.sampling import check_finite


def new_cache(
    model: nn.Module, mode: str, sinks: int, window: int | None, chunk: int, rows: int = 1,
    quantize: str | None = None,
) -> SinkCache:  # fmt: skip
    """A cache for a mode of `perplexity`; for "dense", without the warning about the trained length."""
    with warnings.catch_warnings():
        if mode == "dense":
            warnings.simplefilter("ignore")
        return SinkCache(model, sinks, window, batch_size=rows, chunk=chunk, quantize=quantize)


@torch.no_grad()
def stream_logits(
    model: nn.Module, text: Tensor, cache: SinkCache, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Feed a text, int64 [N], through the cache, from the place where the cache is.

    Yields, for each chunk of n tokens, places int64 [n] on the CPU, and on the model's device logits [n, V] and
    targets int64 [n].
    """
    device = next(model.parameters()).device
    for start in range(int(cache.seen), len(text) - 1, chunk):
        stop = min(start + chunk, len(text) - 1)
        logits = model(text[None, start:stop].to(device), cache)[0]
        yield (
            torch.arange(start, stop, dtype=torch.int64, device="cpu"),
            logits,
            text[start + 1 : stop + 1].to(device),
        )


def stream_nll(
    model: nn.Module, text: Tensor, cache: SinkCache, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `stream_logits`, but yields places int64 [n] and nll float64 [n] in nats, both on the CPU."""
    for places, logits, targets in stream_logits(model, text, cache, chunk):
        yield places, nll_of(logits, targets)


@torch.no_grad()
def recomputed_nll(
    model: nn.Module, text: Tensor, places: Tensor, sinks: int, window: int, batch: int, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of `places` int64 [P], ascending, a dense forward over the tokens that a stream would see.

    Yields as `stream_nll`. For place t, the tokens 0 … S-1 and t-W+1 … t are read as a text of their own, at
    the places 0 … n-1. All places t < S + W read the same beginning of the text, so one dense pass scores them.
    """
    device = next(model.parameters()).device
    span = sinks + window
    early = places[places < span]
    if len(early):
        beginning = text[: int(early[-1]) + 2]
        for passed, nll in stream_nll(model, beginning, new_cache(model, "dense", 0, span, chunk), chunk):
            kept = torch.isin(passed, early)
            if kept.any():
                yield passed[kept], nll[kept]
    rest = places[places >= span]
    for start in range(0, len(rest), batch):
        late = rest[start : start + batch]
        recent = late[:, None] + torch.arange(1 - window, 1, dtype=torch.int64, device="cpu")  # [b, W]
        read = torch.cat(
            (torch.arange(sinks, dtype=torch.int64, device="cpu").expand(len(late), -1), recent), 1
        )
        logits = model(text[read].to(device), logits_to_keep=1)[:, 0]
        yield late, nll_of(logits, text[late + 1].to(device))


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float64 on the CPU [...], from logits [..., V] and targets [...].

    Raises ValueError where one is not finite: such a score is no result.
    """
    nll = nll_unchecked(logits, targets)
    check_finite(float(nll.sum()))
    return nll


def nll_unchecked(logits: Tensor, targets: Tensor) -> Tensor:
    """As `nll_of`, also where a score is not finite."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none")
    return nll.view(targets.shape).cpu().double()


@torch.no_grad()
def scored_texts(
    model: nn.Module,
    texts: Sequence[list[int]],
    cache_of: Callable[[int, int], SinkCache],
    batch: int,
    chunk: int,
) -> list[tuple[Tensor, Tensor]]:
    """For each text [N]: nats float64 [N-1] of the tokens 1 … N-1, and whether each is the most likely, bool [N-1].

    `batch` texts are read together, `chunk` tokens of each at once, through `cache_of(rows, longest)`.
    """
    nothing = torch.empty(0, dtype=torch.float64, device="cpu")
    found: list[tuple[Tensor, Tensor]] = [(nothing, nothing)] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))  # similar lengths in a batch
    device = next(model.parameters()).device
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        read = [len(texts[row]) - 1 for row in rows]
        tokens = torch.zeros(len(rows), max(read) + 1, dtype=torch.int64, device="cpu")
        for row, index in enumerate(rows):
            tokens[row, : len(texts[index])] = torch.tensor(texts[index], dtype=torch.int64, device="cpu")
        tokens = tokens.to(device)
        cache = cache_of(len(rows), max(read))
        nats, hits = [], []
        for start in range(0, max(read), chunk):
            stop = min(start + chunk, max(read))
            lengths = [min(max(count - start, 0), stop - start) for count in read]
            logits = model(tokens[:, start:stop], cache, lengths=lengths)
            targets = tokens[:, start + 1 : stop + 1]
            nats.append(nll_unchecked(logits, targets))
            hits.append((logits.argmax(-1) == targets).cpu())
        all_nats, all_hits = _finite(torch.cat(nats, 1), torch.cat(hits, 1))
        for row, index in enumerate(rows):
            found[index] = all_nats[row, : read[row]], all_hits[row, : read[row]]
    return found


def _finite(nats: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """Scores that are not finite count as a probability of 0, with a warning: NaN would be shown as a result."""
    wrong = ~nats.isfinite()
    if not bool(wrong.any()):
        return nats, hits
    warnings.warn(
        "the model's logits are not finite: in float16 take bfloat16 or float32 instead, else its weights are "
        "damaged; the texts concerned are scored with a log-probability of -inf",
        stacklevel=2,
    )
    return nats.masked_fill(wrong, torch.inf), hits & ~wrong
