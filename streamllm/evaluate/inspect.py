"""Where a model's attention goes: the heat-map of figure 2 of Xiao et al. (arXiv 2309.17453), and how many
sinks a checkpoint needs.

Attention weights are read exactly, for every family alike, without touching a model. A layer hands its keys
and values to a memory and attends to what the memory gives back; a memory that gives back indicators in place
of values (the value of key j is the j-th unit vector) therefore makes the layer *say* its weights, computed
by its own kernel with its own rotation, bias and mask:

    read = Σ_j weight_j · value_j,   value_j = e_j   =>   read = (weight_0, weight_1, …)

A head has D dimensions, so a text of T tokens takes ceil(T / D) copies of it in one batch, each with the
indicators of other D keys, beside one copy with the true values. The first module that is called after the
memory is the one that takes what was read: a pre-hook there notes the weights, and hands on the true row
to all copies, so that they stay equal. Only public hooks, tensors of the usual shapes, one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamllm.evaluate.scoring import Result, perplexity
from streamllm.models.step import Plan, Step, geometry_of


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention weights, averaged over texts that all begin at place 0."""

    weights: Tensor  # float64 [L, H, T, T]: what query t (third axis) pays to key j (fourth)
    texts: int

    def first(self, count: int = 8) -> Tensor:
        """The share that later tokens pay to each of the first `count`: float64 [L, H, count].

        Averaged over the queries of the second half of the texts, which have many other keys to look at: of
        a text of T tokens, even attention gives each about 1.4 / T.
        """
        length = self.weights.shape[-1]
        return self.weights[:, :, length // 2 :, :count].mean(2)


@torch.no_grad()
def attention(
    model: nn.Module, texts: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Attention:
    """The attention weights of every layer and head on texts int64 [N, T], each read densely from place 0.

    Give them the beginning that the model knows (its BOS). Costs (1 + T/D) forwards' work per text and
    8·L·H·T² bytes; exact up to the rounding of the model's type. `progress` is called with (done, total)
    texts. Raises ValueError for texts of another shape, and RuntimeError for a model whose layers do not hand
    what they read to a module.
    """
    if texts.dim() != 2 or len(texts) < 1 or texts.shape[1] < 2 or texts.is_floating_point():
        raise ValueError(
            f"texts must be token ids [N, T], N at least 1 and T at least 2, not {list(texts.shape)}"
        )
    geometry = geometry_of(model)
    length, depth = texts.shape[1], len(geometry.windows)
    copies = 1 + -(-length // geometry.head_dim)
    device = next(model.parameters()).device
    total: Tensor | None = None
    watch = _Watch(geometry.head_dim, length, depth)
    hooks = [module.register_forward_pre_hook(watch.hook) for module in model.modules()]
    try:
        for done, text in enumerate(texts):
            steps = {window: Step.dense(length, window, device) for window in set(geometry.windows)}
            plan = Plan(steps, [_Indicators(watch, layer) for layer in range(depth)])
            watch.seen = {}
            model.hidden(text.to(device).expand(copies, -1), plan)  # type: ignore[operator]
            weights = watch.weights()
            total = weights if total is None else total + weights
            if progress is not None:
                progress(done + 1, len(texts))
    finally:
        for hook in hooks:
            hook.remove()
    assert total is not None
    return Attention(total / len(texts), len(texts))


class _Watch:
    """What the layers read, noted between the memory that a layer asks and the module that it calls next."""

    def __init__(self, head_dim: int, length: int, depth: int) -> None:
        self.head_dim, self.length, self.depth = head_dim, length, depth
        self.waiting: int | None = None  # the layer whose next module is given what attention read
        self.seen: dict[int, Tensor] = {}

    def hook(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.waiting is None:
            return None
        layer, self.waiting = self.waiting, None
        read, *others = inputs  # [1 + copies, T, H·D]
        copies = -(-self.length // self.head_dim)
        if read.shape[:2] == (1 + copies, self.length) and read.shape[2] % self.head_dim == 0:
            heads = read[1:].reshape(copies, self.length, -1, self.head_dim).permute(2, 1, 0, 3)
            self.seen[layer] = heads.flatten(2)[:, :, : self.length].cpu().double()
        return (read[:1].expand_as(read).contiguous(), *others)

    def weights(self) -> Tensor:
        """[L, H, T, T]. Every row must add up to one, or it was not attention that we saw."""
        found = [self.seen.get(layer) for layer in range(self.depth)]
        for layer, weights in enumerate(found):
            if weights is None or ((weights.sum(-1) - 1).abs() > 0.05).any():
                raise RuntimeError(f"layer {layer} hides what its attention reads from the module behind it")
        return torch.stack([weights for weights in found if weights is not None])


class _Indicators:
    """A memory whose copies 1 … of the text have unit vectors for values."""

    def __init__(self, watch: _Watch, layer: int) -> None:
        self.watch, self.layer = watch, layer

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        copies, length, head_dim = v.shape[0] - 1, v.shape[2], v.shape[3]
        units = torch.eye(copies * head_dim, dtype=v.dtype, device=v.device)[:length]  # [T, copies · D]
        values = v.clone()
        values[1:] = units.view(length, copies, head_dim).transpose(0, 1)[:, None]  # [copies, 1, T, D]
        self.watch.waiting = self.layer
        return k, values


@dataclass(frozen=True)
class Recommendation:
    """How many sinks a checkpoint needs, and the scores that say so."""

    sinks: int
    span: int  # sinks + window, the same for every row of the sweep
    tolerance: float
    sweep: tuple[Result, ...]

    def scores(self) -> dict[int, float]:
        """Perplexity beyond twice the cache, by the number of sinks."""
        return {result.sinks: result.beyond(2 * self.span).perplexity for result in self.sweep}


def recommend(
    model: nn.Module,
    tokens: Tensor,
    *,
    sinks: Sequence[int] = (0, 1, 2, 4, 8),
    span: int | None = None,
    tolerance: float = 0.01,
    chunk: int = 256,
    progress: Callable[[Result], None] | None = None,
) -> Recommendation:
    """The fewest sinks whose perplexity on a text [N] is within `tolerance` of the best of the sweep.

    All settings hold the same number of keys, `span` (None: what the model was trained for, at most 1024),
    and are scored on what comes after twice as many tokens, in whole powers of two. Raises ValueError for a
    text shorter than four times the span, and for a span that leaves no room for a window.
    """
    geometry = geometry_of(model)
    if span is None:
        span = min(1024, geometry.trained_length or 1024)
    if not sinks or span <= max(sinks):
        raise ValueError(f"a cache of {span} has no room for a window beside {max(sinks, default=0)} sinks")
    if len(tokens) <= 4 * span:
        raise ValueError(
            f"{len(tokens)} tokens are too few to say what a cache of {span} needs: give more than {4 * span}"
        )
    sweep = tuple(
        perplexity(model, tokens, sinks=count, window=span - count, chunk=chunk, progress=progress)
        for count in sorted(sinks)
    )
    means = [result.beyond(2 * span).mean for result in sweep]
    best = min(means)
    enough = next(r.sinks for r, mean in zip(sweep, means, strict=True) if mean <= best + tolerance)
    return Recommendation(enough, span, tolerance, sweep)
