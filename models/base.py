"""What all architectures share: the model around the layers, Embedding, RMSNorm, the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.models.checks import whole_number, wrong_tokens
from streamllm.models.linear import Linear
from streamllm.models.quantized import HALF
from streamllm.models.step import Cache, Geometry, Plan


class CausalLM(nn.Module):
    """embed, layers, norm, head. A subclass has `hidden`, and `geometry`."""

    geometry: Geometry

    def __init__(self, config: Any, layers: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the model computes; int8 weights do not change it."""
        return self.embed.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """int64 [B, T] -> logits [B, T, V] of a whole text; with a cache, of the next T tokens of its B streams.

        With a cache, T is cut into chunks of `cache.chunk` tokens. Each is planned, computed and committed, so
        that after an exception the streams stand at the end of the last whole chunk. Gradients flow only
        without a cache. `lengths` [B]: how many tokens of each row are real; the rest is padding on the right,
        whose logits mean nothing.
        `logits_to_keep`: return only the last so many rows, or T where T is smaller: [B, min(logits_to_keep, T), V],
        counted from the end of each row's real tokens. A row with fewer real tokens repeats its first; a row of
        length 0, which leaves its stream as it is, has zeros.

        Raises ValueError for tokens that are not integers [B, T] within the vocabulary on the model's device, for
        lengths outside 0 … T or without a cache, and for a cache of another model, batch, type or device, or under
        autocast; RuntimeError where another thread uses the cache.
        """
        logits_to_keep = check_tokens(self, tokens, logits_to_keep)
        counts = check_lengths(tokens, cache, lengths)
        if cache is None:
            x = self.hidden(tokens, self.geometry.dense_plan(tokens.shape[1], tokens.device))
            return self.project(x if logits_to_keep is None else last(x, logits_to_keep))
        cache.check_model(self.geometry, tokens.device)
        with cache.guard, torch.no_grad():  # a stream has no end at which its graph could be freed
            return self._stream(tokens, cache, counts, logits_to_keep)

    def _stream(
        self, tokens: Tensor, cache: Cache, counts: Sequence[int] | None, logits_to_keep: int | None
    ) -> Tensor:
        length, kept = tokens.shape[1], []
        for start in range(0, length, cache.chunk):
            part = tokens[:, start : start + cache.chunk]
            plan = cache.plan(part.shape[1], counts and real_tokens(counts, start, part.shape[1]))
            x = self.hidden(part, plan)
            if logits_to_keep is None:
                kept.append(self.project(x))
            else:
                kept = keep_rows(kept, x, start, length, counts, logits_to_keep)
            if start + part.shape[1] == length:  # before the commit: a forward that fails changes nothing
                rows = kept[0] if len(kept) == 1 else torch.cat(kept, 1)
                logits = rows if logits_to_keep is None else self.project(rows)
                if logits_to_keep is not None and counts is not None:
                    for row, count in enumerate(counts):
                        if count == 0:
                            logits[row] = 0
            cache.commit(plan)
        return logits

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], the input of the head."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """[B, T, C] -> logits [B, T, V]."""
        return self.head(x)  # type: ignore[no-any-return]


def check_tokens(model: CausalLM, tokens: Tensor, logits_to_keep: int | None) -> int | None:
    """`logits_to_keep`, at most T. Raises ValueError, see `CausalLM.forward`."""
    device, vocab_size = next(model.parameters()).device, model.geometry.vocab_size
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        raise wrong_tokens(tokens, device)
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.device != device:
        raise wrong_tokens(tokens, device)
    # On another device, reading the values would wait for it; torch.export has no values to read.
    if device.type == "cpu" and not torch.compiler.is_exporting():
        ends = [tokens.item()] if tokens.numel() == 1 else [int(end) for end in torch.aminmax(tokens)]
        if ends[0] < 0 or ends[-1] >= vocab_size:
            wrong = ends[0] if ends[0] < 0 else ends[-1]
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of 0 … {vocab_size - 1}")
    if logits_to_keep is None:
        return None
    return min(whole_number("logits_to_keep", logits_to_keep, 1), tokens.shape[1])


def check_lengths(
    tokens: Tensor, cache: Cache | None, lengths: Tensor | Sequence[int] | None
) -> list[int] | None:
    """The lengths as a list; None where every token is real. Raises ValueError, see `CausalLM.forward`."""
    batch, length = tokens.shape
    if cache is not None and batch != cache.batch_size:
        raise ValueError(
            f"the cache was made for a batch of {cache.batch_size}, the tokens have {batch} rows"
        )
    return None if lengths is None else _real_counts(lengths, cache, batch, length)


def _real_counts(
    lengths: Tensor | Sequence[int], cache: Cache | None, batch: int, length: int
) -> list[int] | None:
    if cache is None:
        raise ValueError("lengths need a cache: without one every row is a whole text of its own")
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    try:
        counts = [whole_number("length", count) for count in given]
    except (TypeError, ValueError):
        counts = []
    if len(counts) != batch or not all(0 <= count <= length for count in counts):
        raise ValueError(f"lengths must be {batch} whole numbers in 0 … {length}, one per row, not {given}")
    return None if all(count == length for count in counts) else counts


def real_tokens(counts: Sequence[int], start: int, length: int) -> list[int] | None:
    """How many of the tokens `start` … `start + length` - 1 are real, for each row; None where all are."""
    real = [min(max(count - start, 0), length) for count in counts]
    return None if min(real) == length else real


def keep_rows(
    kept: list[Tensor], x: Tensor, start: int, length: int, counts: Sequence[int] | None, keep: int
) -> list[Tensor]:
    """What is kept of the chunks so far, and of x [B, T, C], the chunk at `start` of `length` tokens.

    Without counts: the parts of the last `keep` tokens. With counts: one tensor [B, keep, C], the last real tokens
    of each row as far as they have come.
    """
    if counts is not None:
        wanted = torch.tensor(
            [[max(count - keep + i, 0) - start for i in range(keep)] for count in counts],
            dtype=torch.int64,
            device="cpu",
        )
        inside = ((wanted >= 0) & (wanted < x.shape[1])).to(x.device)[:, :, None]
        rows = wanted.clamp(0, x.shape[1] - 1).to(x.device)[:, :, None].expand(-1, -1, x.shape[2])
        found = x.gather(1, rows)
        return [torch.where(inside, found, kept[0]) if kept else found]
    first = max(0, length - keep - start)
    return kept if first >= x.shape[1] else [*kept, last(x, x.shape[1] - first)]


def last(x: Tensor, count: int) -> Tensor:
    """The last `count` rows of x [B, T, C], as a tensor of their own.

    A slice would keep x alive. And with the strides of x, a head in bfloat16 on a CPU copies its whole weight.
    """
    return x if count >= x.shape[1] else x[:, -count:].clone(memory_format=torch.contiguous_format)


class Embedding(nn.Embedding):
    """int64 [...] -> [..., C]. Its weight is uninitialised, as Linear's."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) over the last axis, in float32 for half types."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in HALF:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        if x.is_cuda:  # one kernel instead of five: on a GPU, small kernels cost more in gaps than in work
            normed = F.rms_norm(wide, self.weight.shape, None, self.eps)
        else:
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)  # rounded before the weight, as in training


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# By their names in config.json. gelu is the exact one; the others move the logits by about 1e-3.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "quick_gelu": _quick_gelu,
}
