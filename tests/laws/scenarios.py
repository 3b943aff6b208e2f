"""Tiny models with large random weights, random tokens, and ways to feed them to a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.models import llama
from streamllm.models.rotary import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from tests.laws import reference
from tests.laws.networks import network

TOLERANCE = 1e-9  # of the standard deviation of the logits
VOCABULARY = 61
ROPES = {
    "default": Rope(10000.0, 8),
    "linear": LinearRope(10000.0, 8, factor=4.0),
    "llama3": Llama3Rope(10000.0, 8, factor=8.0, original=64),
    "yarn": YarnRope(10000.0, 8, attention_factor=1.2, factor=4.0, original=32),
    "dynamic": DynamicRope(10000.0, 8, factor=2.0, positions=8),
    "longrope": LongRope(
        10000.0, 8, attention_factor=1.1, factor=4.0, original=8,
        short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(1.5, 2.0, 3.0, 5.0),
    ),
    "partial": Rope(10000.0, 4),
    "partial, odd": Rope(10000.0, 5),
    "fast": Rope(3.0, 8),
}  # fmt: skip


@lru_cache(maxsize=64)
def tiny_llama(
    rope: str = "default",
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    trained_length: int = 10**6,
    **changes: object,
) -> llama.Model:
    """A Llama of three layers and width 32, with large random weights."""
    config = llama.Config(
        vocab_size=VOCABULARY, width=32, mlp_width=48, layers=3, heads=heads, kv_heads=kv_heads, head_dim=8,
        rope=ROPES[rope], trained_length=trained_length, norm_eps=1e-5, activation="silu",
        attention_bias=True, mlp_bias=True, tied=False,
    )  # fmt: skip
    model = llama.Model(replace(config, **changes))
    return randomize(model, dtype)


def randomize(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with large random weights, norms and biases, so that every mistake changes the logits clearly."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        std = 0.3 if "embed" not in name else 1.0
        mean = 1.0 if "norm" in name else 0.0
        weight.data = (torch.randn(weight.shape, generator=generator) * std + mean).to(dtype)
    return model.requires_grad_(False)


def random_tokens(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Random tokens [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(
    model: llama.Model, tokens: Tensor, sinks: int, window: int, int8: bool = False
) -> Tensor:
    """The logits [B, T, V] of the reference implementation for streams [B, T]."""
    return torch.stack([_reference_logits(model, tuple(row.tolist()), sinks, window, int8) for row in tokens])


@lru_cache(maxsize=512)
def _reference_logits(
    model: llama.Model, tokens: tuple[int, ...], sinks: int, window: int, int8: bool
) -> Tensor:
    return reference.run(network(model), tokens, sinks, window, int8)


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of `wanted`; infinite where a number is NaN."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    difference = ((got - wanted).abs().max() / wanted.std()).item()
    return difference if difference == difference else float("inf")


def random_split(length: int, seed: int, longest: int = 20) -> list[int]:
    """A random split of `length` into parts of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[int] = []
    while (left := length - sum(parts)) > 0:
        top = int(torch.randint(1, longest + 1, (1,), generator=generator))
        parts.append(min(left, int(torch.randint(1, top + 1, (1,), generator=generator))))
    return parts


def feed(model: nn.Module, cache: SinkCache, tokens: Tensor, parts: Iterable[int] | None = None) -> Tensor:
    """The logits of all tokens [B, T], fed in forwards of `parts` tokens (None: one by one)."""
    parts = [1] * tokens.shape[1] if parts is None else list(parts)
    assert sum(parts) == tokens.shape[1]
    return torch.cat([model(part, cache) for part in tokens.split(parts, 1)], 1)


class Rows:
    """Streams of one batch that are fed different numbers of tokens.

    Attributes:
        fed: the tokens of each row since it started.
        logits: of each of these tokens.
    """

    def __init__(self, model: nn.Module, cache: SinkCache) -> None:
        self.model, self.cache = model, cache
        self.fed: list[list[int]] = [[] for _ in range(cache.batch_size)]
        self.logits: list[list[Tensor]] = [[] for _ in range(cache.batch_size)]

    def feed(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Feed tokens [B, T], of which each row has `lengths` (None: T)."""
        lengths_tensor = None if lengths is None else torch.tensor(lengths)
        out = self.model(tokens, self.cache, lengths=lengths_tensor)
        for row, count in enumerate([tokens.shape[1]] * len(tokens) if lengths is None else lengths):
            self.fed[row] += tokens[row, :count].tolist()
            self.logits[row] += list(out[row, :count])

    def restart(self, rows: Sequence[int]) -> None:
        self.cache.reset(rows)
        for row in rows:
            self.fed[row], self.logits[row] = [], []

    def error(self) -> float:
        """The largest difference of any row from the reference for that stream alone."""
        cache, worst = self.cache, []
        for tokens, logits in zip(self.fed, self.logits, strict=True):
            if tokens:
                int8 = cache.quantize == "int8"
                wanted = reference_logits(self.model, torch.tensor([tokens]), cache.sinks, cache.window, int8)
                worst.append(error(torch.stack(logits)[None], wanted))
        return max(worst)


class Interrupted(Exception):
    """Raised by `failing`."""


@contextmanager
def failing(module: nn.Module, after: int = 0) -> Iterator[None]:
    """Within this context, the module raises Interrupted after its forward `after` (from 0) and later ones."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interrupted

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def feed_mixed_chunks(model: nn.Module) -> Rows:
    """Three rows that are fed single tokens, chunks and ragged chunks in turn. One of them is reset."""
    rows = Rows(model, SinkCache(model, 2, 5, 3, chunk=4))
    rows.feed(random_tokens(9, 3))
    for turn, lengths in enumerate([None, [1, 1, 1], [3, 0, 1], [1, 4, 3], None]):
        for extra in range(3):
            rows.feed(random_tokens(1, 3, seed=10 * turn + extra))
        rows.feed(random_tokens(4 if lengths else 6, 3, seed=turn), lengths)
    rows.restart([1])
    for extra in range(20):
        rows.feed(random_tokens(1, 3, seed=100 + extra))
    return rows
