"""Where a model's attention goes: the heat map of figure 2 of Xiao et al. (arXiv 2309.17453), and how many
sinks a checkpoint needs.

Attention weights are read exactly, in the same way for every family, without changing the model. A layer
appends its keys and values to a store and attends to what the store returns. Here the store returns unit
vectors in place of values: the value of key j is e_j. Then the output of attention is the row of weights,
computed by the layer's own kernel with its own rotation, bias and mask:

    output = Σ_j weight_j · value_j,   value_j = e_j   =>   output = (weight_0, weight_1, …)

A head has D dimensions, so a text of T tokens needs ceil(T / D) copies in one batch, each with the unit
vectors of D other keys, next to one copy with the true values. The first module that is called after the
store receives the output of attention. A pre-hook there records the weights, and replaces the input of every
copy by that of the true one, so that all copies stay equal. This takes public hooks only, and one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamllm.evaluate.result import Result
from streamllm.evaluate.scoring import perplexity
from streamllm.models.step import Plan, Step, geometry_of
from streamllm.sampling import check_finite


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention weights, averaged over texts that all begin at place 0."""

    weights: Tensor  # float64 [L, H, T, T]: weight of key j (last axis) for query t
    texts: int

    def first(self, count: int = 8) -> Tensor:
        """The share of attention that later tokens pay to each of the first `count`: float64 [L, H, count].

        The mean over the queries in the second half of the texts, which see many other keys: in a text of T
        tokens, uniform attention gives each key about 1.4 / T.
        """
        length = self.weights.shape[-1]
        return self.weights[:, :, length // 2 :, :count].mean(2)


@torch.no_grad()
def attention(
    model: nn.Module, texts: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Attention:
    """The attention weights of every layer and head on texts int64 [N, T], each read densely from place 0.

    The texts should begin as the training texts did (with BOS). Each text costs the work of 1 + T/D forwards,
    and the result 8·L·H·T² bytes. Exact up to the rounding of the model's type. `progress` is called with
    (done, total) texts. Raises ValueError for texts of another shape, and RuntimeError for a model whose layers
    do not pass the output of attention to a module.
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
    recorder = _Recorder(geometry.head_dim, length, depth)
    hooks = [module.register_forward_pre_hook(recorder.hook) for module in model.modules()]
    try:
        for done, text in enumerate(texts):
            steps = {window: Step.dense(length, window, device) for window in set(geometry.windows)}
            plan = Plan(steps, [_UnitVectorStore(recorder, layer) for layer in range(depth)])
            recorder.recorded = {}
            model.hidden(text.to(device).expand(copies, -1), plan)  # type: ignore[operator]
            weights = recorder.weights()
            total = weights if total is None else total + weights
            if progress is not None:
                progress(done + 1, len(texts))
    finally:
        for hook in hooks:
            hook.remove()
    assert total is not None
    return Attention(total / len(texts), len(texts))


class _Recorder:
    """Records the output of attention, which a layer passes to the first module that it calls after its store."""

    def __init__(self, head_dim: int, length: int, depth: int) -> None:
        self.head_dim, self.length, self.depth = head_dim, length, depth
        self.waiting: int | None = None  # the layer that has called its store, and no module since
        self.recorded: dict[int, Tensor] = {}  # layer -> weights [H, T, T]

    def hook(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.waiting is None:
            return None
        layer, self.waiting = self.waiting, None
        output, *others = inputs  # [1 + copies, T, H·D]
        copies = -(-self.length // self.head_dim)
        if output.shape[:2] == (1 + copies, self.length) and output.shape[2] % self.head_dim == 0:
            heads = output[1:].reshape(copies, self.length, -1, self.head_dim).permute(2, 1, 0, 3)
            self.recorded[layer] = heads.flatten(2)[:, :, : self.length].cpu().double()
        return (output[:1].expand_as(output).contiguous(), *others)

    def weights(self) -> Tensor:
        """[L, H, T, T]. Rows that do not sum to one are no attention weights, which is an error."""
        found = [self.recorded.get(layer) for layer in range(self.depth)]
        check_finite(sum(float(weights.sum()) for weights in found if weights is not None))
        for layer, weights in enumerate(found):
            if weights is None or ((weights.sum(-1) - 1).abs() > 0.05).any():
                raise RuntimeError(
                    f"the attention of layer {layer} cannot be read: the first module after its store is not "
                    f"called with the output of attention"
                )
        return torch.stack([weights for weights in found if weights is not None])


class _UnitVectorStore:
    """A store that returns unit vectors as the values of every row but the first."""

    def __init__(self, recorder: _Recorder, layer: int) -> None:
        self.recorder, self.layer = recorder, layer

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        copies, length, head_dim = v.shape[0] - 1, v.shape[2], v.shape[3]
        units = torch.eye(copies * head_dim, dtype=v.dtype, device=v.device)[:length]  # [T, copies · D]
        values = v.clone()
        values[1:] = units.view(length, copies, head_dim).transpose(0, 1)[:, None]  # [copies, 1, T, D]
        self.recorder.waiting = self.layer
        return k, values


@dataclass(frozen=True)
class Recommendation:
    """How many sinks a checkpoint needs, and the scores that show it."""

    sinks: int
    span: int  # sinks + window, the same for every row of the sweep
    tolerance: float
    sweep: tuple[Result, ...]

    def scores(self) -> dict[int, float]:
        """Perplexity beyond position 2 · span, by the number of sinks."""
        return {result.sinks: result.beyond(2 * self.span).perplexity for result in self.sweep}


def check_sweep(model: nn.Module, tokens: int, sinks: Sequence[int], span: int | None) -> int:
    """The span of `recommend` for a text of so many tokens.

    Raises the ValueErrors of `recommend`, before any computation.
    """
    if span is None:
        span = min(1024, geometry_of(model).trained_length or 1024)
    if not sinks or span <= max(sinks):
        raise ValueError(f"a cache of {span} has no room for a window beside {max(sinks, default=0)} sinks")
    if tokens <= 4 * span:
        raise ValueError(f"{tokens} tokens are too few to score a cache of {span}: give more than {4 * span}")
    return span


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

    All settings keep the same number of keys, `span` (None: what the model was trained for, at most 1024), and
    are scored beyond position 2 · span, from the next power of two on. Raises ValueError for a text of at most
    4 · span tokens, and for a span that leaves no room for a window.
    """
    span = check_sweep(model, len(tokens), sinks, span)
    sweep = tuple(
        perplexity(model, tokens, sinks=count, window=span - count, chunk=chunk, progress=progress)
        for count in sorted(sinks)
    )
    means = [result.beyond(2 * span).mean for result in sweep]
    best = min(means)
    enough = next(r.sinks for r, mean in zip(sweep, means, strict=True) if mean <= best + tolerance)
    return Recommendation(enough, span, tolerance, sweep)
