"""How well a model predicts a long text, under the four ways of attending to it.

    sinks      each token sees the first S tokens and the last W (Xiao et al., arXiv 2309.17453, section 3.2)
    window     the last W only: the same stream with S = 0
    dense      everything before it: the same stream with a window as long as the text
    recompute  for every token a fresh dense forward over the first S and the last W tokens; slow, and the
               quality that the others are measured against (the paper's baseline has S = 0)

The window counts the token itself: the paper's "4 + 1020", which evicts after the forward, is sinks=4,
window=1021 here.

The *position* of a prediction is the place in the text of the token that is predicted, which is how many
tokens came before it. A text of N tokens has the N - 1 predictions at the positions 1 … N-1; that at
position p is what token p-1 says, with the keys that token p-1 may see. Scores are negative log-likelihoods
in nats, added up in float64.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.cache import SinkCache

MODES = ("sinks", "window", "dense", "recompute")


@dataclass(frozen=True)
class Bucket:
    """The predictions at the positions start … stop-1 that were scored."""

    start: int
    stop: int
    nll: float  # nats, summed
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return _exp(self.mean)


@dataclass(frozen=True)
class Result:
    """What was asked, and the score so far: plain data, and the live cache to go on with."""

    mode: str
    sinks: int
    window: int  # keys behind the sinks, the token's own included; in dense mode the longest text
    nll: float  # nats, summed over the scored predictions
    tokens: int  # predictions scored
    total: int  # predictions to be scored
    buckets: tuple[Bucket, ...]  # by position, between powers of two
    text: int = 0  # the text that comes next, and how many of its predictions are behind us
    place: int = 0
    quantize: str | None = None  # how the cache rounds what it stores
    cache: SinkCache | None = field(default=None, repr=False, compare=False)  # None once a text is finished

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return _exp(self.mean)

    @property
    def done(self) -> bool:
        return self.tokens == self.total

    def beyond(self, position: int) -> Bucket:
        """All buckets that start at `position` or later, as one."""
        chosen = [bucket for bucket in self.buckets if bucket.start >= position]
        start = min((bucket.start for bucket in chosen), default=position)
        stop = max((bucket.stop for bucket in chosen), default=position)
        return Bucket(start, stop, sum(b.nll for b in chosen), sum(b.tokens for b in chosen))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with mean and perplexity beside the sums (None where infinite); without the cache."""
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
    for, at most 1020). "window" takes 0 for the sinks, "dense" the longest text for the window. The value
    does not depend on `chunk`: a chunk of tokens is exact, and logits exist for one chunk at a time, so that
    memory does not depend on the length of the text (except in dense mode, whose cache holds it).
    "recompute" costs S + W tokens for each prediction, computed `batch` at a time. `quantize` is as for
    SinkCache; "recompute", which stores nothing, takes None for it.

    `every` scores only every n-th prediction; `positions` only so many at random (`seed`), the same ones in
    every mode. `progress` is called with the score so far after each chunk. A run that was interrupted goes
    on when the last of these is given as `resume`, with the same arguments: the totals come out the same to
    the last bit. `save` and `load` carry one through a file.

    Raises ValueError for an unknown mode, a text of fewer than two tokens, numbers out of range, and a
    `resume` that belongs to another run or whose cache was moved on.
    """
    texts = [text.cpu() for text in ([tokens] if isinstance(tokens, Tensor) else tokens)]
    _check(texts, mode, chunk=chunk, every=every, batch=batch)
    counts = [len(text) - 1 for text in texts]
    if mode in ("window", "dense"):
        sinks = 0
    if mode == "recompute":
        quantize = None
    if mode == "dense":
        window = max(counts) + 1
    elif window is None:
        window = new_cache(model, mode, sinks, None, chunk, quantize=quantize).window
    wanted = _wanted(sum(counts), every, positions, seed)
    total = sum(counts) if wanted is None else len(wanted)
    blank = Result(mode, sinks, window, 0.0, 0, total, (), quantize=quantize)
    result = blank if resume is None else resume
    if (result.mode, result.sinks, result.window, result.quantize, result.total) != (
        mode, sinks, window, quantize, total,
    ):  # fmt: skip
        raise ValueError(f"cannot go on with a run of other settings: {result} is not {blank}")

    while result.text < len(texts):
        text, first = texts[result.text], sum(counts[: result.text])
        inside = (
            None if wanted is None else wanted[(wanted >= first) & (wanted < first + len(text) - 1)] - first
        )
        cache: SinkCache | None = None
        pieces: Iterator[tuple[Tensor, Tensor]]
        if mode == "recompute":
            chosen = torch.arange(len(text) - 1) if inside is None else inside
            pieces = recomputed(model, text, chosen[chosen >= result.place], sinks, window, batch, chunk)
        else:
            cache = _continued(result, model, chunk)
            cache = cache or new_cache(model, mode, sinks, window, chunk, quantize=quantize)
            pieces = streamed(model, text, cache, chunk)
        for places, nll in pieces:
            past = int(places[-1]) + 1
            if inside is not None and cache is not None:
                kept = torch.isin(places, inside)
                places, nll = places[kept], nll[kept]
            result = replace(_added(result, places + 1, nll), place=past, cache=cache)
            if progress is not None and past < len(text) - 1:
                progress(result)
        result = replace(result, text=result.text + 1, place=0, cache=None)
        if progress is not None:
            progress(result)
    return result


def streamed(model: nn.Module, text: Tensor, cache: SinkCache, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Feed a text [N] through the cache, from where that stands, and yield (places, nll) chunk by chunk.

    places int64 [n] of the tokens that predict, nll float64 [n] of what each says of the token behind it.
    """
    for places, logits, targets in predictions(model, text, cache, chunk):
        yield places, _nll(logits, targets)


@torch.no_grad()
def predictions(
    model: nn.Module, text: Tensor, cache: SinkCache, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As `streamed`, with (places [n], logits [n, V], targets [n]), the latter two on the model's device."""
    device = next(model.parameters()).device
    for start in range(int(cache.seen), len(text) - 1, chunk):
        stop = min(start + chunk, len(text) - 1)
        logits = model(text[None, start:stop].to(device), cache)[0]
        yield torch.arange(start, stop), logits, text[start + 1 : stop + 1].to(device)


@torch.no_grad()
def recomputed(
    model: nn.Module, text: Tensor, places: Tensor, sinks: int, window: int, batch: int, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of `places` [P], ascending, a dense forward over what it would see; yields as `streamed`.

    The tokens 0 … S-1 and t-W+1 … t are read as a text of their own, at the places 0 … n-1. All t < S + W
    read the same beginning of the text, which is scored densely, once.
    """
    device = next(model.parameters()).device
    span = sinks + window
    early = places[places < span]
    if len(early):
        beginning = text[: int(early[-1]) + 2]
        for passed, nll in streamed(model, beginning, new_cache(model, "dense", 0, span, chunk), chunk):
            kept = torch.isin(passed, early)
            if kept.any():
                yield passed[kept], nll[kept]
    rest = places[places >= span]
    for start in range(0, len(rest), batch):
        late = rest[start : start + batch]
        recent = late[:, None] + torch.arange(1 - window, 1)  # [b, W]
        read = torch.cat((torch.arange(sinks).expand(len(late), -1), recent), 1)
        logits = model(text[read].to(device), logits_to_keep=1)[:, 0]
        yield late, _nll(logits, text[late + 1].to(device))


@dataclass(frozen=True)
class Comparison:
    """Streaming against re-computation, prediction by prediction; nats per token."""

    sinks: int
    window: int
    tokens: int  # predictions compared
    streaming: float  # mean nll
    recompute: float
    difference: float  # mean of streaming - recompute
    spread: float  # standard deviation of that difference between predictions
    eighths: tuple[float, ...]  # the mean difference in each eighth of the text: drift would show here

    @property
    def error(self) -> float:
        """Standard error of `difference`."""
        return self.spread / math.sqrt(self.tokens)

    @property
    def ratio(self) -> float:
        """Perplexity of streaming over that of re-computation."""
        return _exp(self.difference)


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

    Both see the same S + W tokens; they differ in what the kept keys had seen when they were made, which is
    what streaming saves. Before the first eviction they agree, so no position is drawn from there.
    `progress` is called with (done, total) tokens and predictions. Raises ValueError as `perplexity` does,
    and for a text that does not outgrow the window.
    """
    tokens = tokens.cpu()
    _check([tokens], "sinks", chunk=chunk, batch=batch, positions=positions)
    cache = new_cache(model, "sinks", sinks, window, chunk)
    span, last = sinks + cache.window, len(tokens) - 1
    if last <= span:
        raise ValueError(f"{len(tokens)} tokens do not outgrow sinks + window = {span}: give a longer text")
    places = span + _sample(last - span, positions, seed)
    total = last + len(places)
    kept: list[Tensor] = []
    for passed, nll in streamed(model, tokens, cache, chunk):
        kept.append(nll[torch.isin(passed, places)])
        if progress is not None:
            progress(int(passed[-1]) + 1, total)
    stream, fresh = torch.cat(kept), torch.empty(len(places), dtype=torch.float64)
    done = 0
    for _, nll in recomputed(model, tokens, places, sinks, cache.window, batch, chunk):
        fresh[done : done + len(nll)] = nll
        done += len(nll)
        if progress is not None:
            progress(last + done, total)
    apart = stream - fresh
    eighth = (places * 8).div(last, rounding_mode="floor")
    return Comparison(
        sinks=sinks,
        window=cache.window,
        tokens=len(places),
        streaming=float(stream.mean()),
        recompute=float(fresh.mean()),
        difference=float(apart.mean()),
        spread=float(apart.std()) if len(places) > 1 else math.nan,
        eighths=tuple(float(apart[eighth == part].mean()) for part in range(8)),
    )


def save(result: Result, path: str | Path) -> None:
    """Write an unfinished run to a safetensors file: the score so far, and the keys and values in the cache.

    Raises ValueError where the cache has moved on since, as after an interruption in the middle of a chunk.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    if result.cache is not None:
        _continued_check(result, result.cache)
        tensors = {name: tensor.contiguous() for name, tensor in result.cache.state_dict().items()}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"result": json.dumps(result.to_dict())})
    partial.replace(path)  # an interruption while writing leaves the older file whole


def load(model: nn.Module, path: str | Path) -> Result:
    """Read what `save` wrote, to be given to `perplexity` as `resume`.

    Raises ValueError where the file belongs to another model: a cache of other shapes.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        result = Result.from_dict(json.loads(file.metadata()["result"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not state:
        return result
    cache = new_cache(model, result.mode, result.sinks, result.window, 1, quantize=result.quantize)
    try:
        cache.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path} belongs to another model: {error}") from None
    return replace(result, cache=cache)


def new_cache(
    model: nn.Module, mode: str, sinks: int, window: int | None, chunk: int, rows: int = 1,
    quantize: str | None = None,
) -> SinkCache:  # fmt: skip
    """The cache of a mode; in dense mode without the warning that it outgrows what the model knows."""
    with warnings.catch_warnings():
        if mode == "dense":
            warnings.simplefilter("ignore")
        return SinkCache(model, sinks, window, batch_size=rows, chunk=chunk, quantize=quantize)


def _continued(result: Result, model: nn.Module, chunk: int) -> SinkCache | None:
    if result.cache is None:
        if result.place:
            raise ValueError("cannot go on in the middle of a text without its cache: see save and load")
        return None
    _continued_check(result, result.cache)
    result.cache.chunk = chunk
    return result.cache


def _continued_check(result: Result, cache: SinkCache) -> None:
    if int(cache.seen) != result.place:
        raise ValueError(
            f"the cache has moved on: it has seen {int(cache.seen)} tokens, the score has {result.place}"
        )


def _added(result: Result, positions: Tensor, nll: Tensor) -> Result:
    """The score with these predictions, positions int64 [n] and nll float64 [n], added."""
    power = torch.frexp(positions.double()).exponent.long() - 1  # position 2^k … 2^(k+1)-1 -> k
    size = max(len(result.buckets), int(power.max()) + 1 if len(power) else 0)
    sums = torch.bincount(power, nll, minlength=size).tolist()
    counts = torch.bincount(power, minlength=size).tolist()
    blank = tuple(Bucket(1 << k, 2 << k, 0.0, 0) for k in range(len(result.buckets), size))
    return replace(
        result,
        nll=result.nll + float(nll.sum()),
        tokens=result.tokens + len(nll),
        buckets=tuple(
            replace(bucket, nll=bucket.nll + more, tokens=bucket.tokens + count)
            for bucket, more, count in zip((*result.buckets, *blank), sums, counts, strict=True)
        ),
    )


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, V], targets [n] -> float64 [n] on the CPU."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="none").cpu().double()


def _wanted(total: int, every: int, positions: int | None, seed: int) -> Tensor | None:
    """Which of `total` predictions are scored, ascending; None: all."""
    if positions is not None and every != 1:
        raise ValueError("give every or positions, not both")
    if positions is not None:
        if positions < 1:
            raise ValueError(f"positions must be at least 1, not {positions}")
        return _sample(total, positions, seed)
    return None if every == 1 else torch.arange(0, total, every)


def _sample(total: int, count: int, seed: int) -> Tensor:
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return chosen.sort().values


def _check(texts: Sequence[Tensor], mode: str, **numbers: int) -> None:
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


def _exp(mean: float) -> float:
    return math.inf if mean > 700 else math.exp(mean)
