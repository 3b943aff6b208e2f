"""CausalLM: what all models share that is no architecture: the forward's arguments, chunks, and the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from streamllm.models.layers import Embedding, Linear
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
        without a cache. `lengths` [B]: how many tokens of each row are real; the rest is padding on the right.
        `logits_to_keep`: return only the last so many rows, [B, logits_to_keep, V], counted from the end of
        each row's real tokens (a row with fewer repeats its first).

        Raises ValueError for tokens that are not integers [B, T] within the vocabulary, for lengths outside
        0 … T or without a cache, and for a batch that is not the cache's.
        """
        counts = check_input(self.geometry.vocab_size, tokens, cache, lengths, logits_to_keep)
        if cache is None:
            x = self.hidden(tokens, self.geometry.dense_plan(tokens.shape[1], tokens.device))
            return self.project(x if logits_to_keep is None else x[:, -logits_to_keep:])
        kept = KeptRows(tokens.shape[1], counts, logits_to_keep)
        with torch.no_grad():  # a stream has no end at which its graph could be freed
            for start in range(0, tokens.shape[1], cache.chunk):
                part = tokens[:, start : start + cache.chunk]
                plan = cache.plan(part.shape[1], kept.real_tokens(start, part.shape[1]))
                x = self.hidden(part, plan)
                kept.add(start, self.project(x) if logits_to_keep is None else x)
                if (
                    start + part.shape[1] == tokens.shape[1]
                ):  # before the commit: a failed forward changes nothing
                    logits = kept.rows() if logits_to_keep is None else self.project(kept.rows())
                cache.commit(plan)
        return logits

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One chunk: int64 [B, T] -> [B, T, C], the input of the head."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """[B, T, C] -> logits [B, T, V]."""
        return self.head(x)  # type: ignore[no-any-return]


class KeptRows:
    """The rows of a chunked forward that the caller reads, gathered chunk by chunk."""

    def __init__(self, length: int, counts: Sequence[int] | None, keep: int | None) -> None:
        self._length, self._counts, self._keep = length, counts, keep
        self._parts: list[Tensor] = []

    def real_tokens(self, start: int, length: int) -> list[int] | None:
        """How many tokens of the chunk at `start` are real, for each row; None: all."""
        if self._counts is None:
            return None
        return [min(max(count - start, 0), length) for count in self._counts]

    def add(self, start: int, x: Tensor) -> None:
        """The chunk at `start`: [B, T, …]."""
        if self._keep is None:
            self._parts.append(x)
        elif self._counts is not None:
            self._parts = [self._last_real(start, x, self._counts, self._keep)]
        elif start + x.shape[1] > self._length - self._keep:  # a slice of length 0 would keep the chunk alive
            self._parts.append(x[:, max(0, self._length - self._keep - start) :])

    def rows(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, 1)

    def _last_real(self, start: int, x: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        """[B, keep, C]: the last real tokens of each row, as far as they lie in this chunk or an earlier one."""
        wanted = torch.tensor(
            [[max(count - keep + i, 0) - start for i in range(keep)] for count in counts], dtype=torch.int64
        )
        inside = ((wanted >= 0) & (wanted < x.shape[1])).to(x.device)[:, :, None]
        rows = wanted.clamp(0, x.shape[1] - 1).to(x.device)[:, :, None].expand(-1, -1, x.shape[2])
        found = x.gather(1, rows)
        return torch.where(inside, found, self._parts[0]) if self._parts else found


def check_input(
    vocab_size: int,
    tokens: Tensor,
    cache: Cache | None,
    lengths: Tensor | Sequence[int] | None,
    logits_to_keep: int | None,
) -> list[int] | None:
    """The lengths as a list; None where every token is real. Raises ValueError, see `CausalLM.forward`."""
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be int64 or int32 of shape [batch, length] with at least one of each, "
            f"not {tokens.dtype} of shape {list(tokens.shape)}"
        )
    if tokens.device.type == "cpu":  # on another device, reading the values would wait for it
        ends = [int(end) for end in ([tokens] if tokens.numel() == 1 else torch.aminmax(tokens))]
        lowest, highest = ends[0], ends[-1]
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of 0 … {vocab_size - 1}")
    if logits_to_keep is not None and logits_to_keep < 1:
        raise ValueError(f"logits_to_keep must be at least 1 (None: all), not {logits_to_keep}")
    if cache is None:
        if lengths is not None:
            raise ValueError("lengths need a cache: without one every row is a whole text of its own")
        return None
    batch, length = tokens.shape
    if batch != cache.batch_size:
        raise ValueError(
            f"the cache was made for a batch of {cache.batch_size}, the tokens have {batch} rows"
        )
    if lengths is None:
        return None
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    try:
        counts = [index(count) for count in given]
    except TypeError:
        counts = []
    if len(counts) != batch or not all(0 <= count <= length for count in counts):
        raise ValueError(f"lengths must be {batch} whole numbers in 0 … {length}, one per row, not {given}")
    return None if all(count == length for count in counts) else counts
