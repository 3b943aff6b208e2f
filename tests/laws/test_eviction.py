"""The law of eviction: after any entries are taken out, the logits equal lists that do it entry by entry.

In float64, against the reference implementation. The law allows 1e-9 standard deviations of the logits.
"""

from __future__ import annotations

import random

import pytest
import torch

from streamllm.cache import SinkCache
from tests.laws.evicting import EvictingRows
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import TOLERANCE, random_split, random_tokens, tiny_llama


def feed(rows: EvictingRows, count: int, seed: int, split: bool = True) -> None:
    """Feed tokens to all rows, one by one or in random parts."""
    tokens = random_tokens(count, rows.cache.batch_size, seed=seed)
    for part in tokens.split(random_split(count, seed=seed) if split else 1, 1):
        rows.feed(part)


def evict_some(rows: EvictingRows, draw: random.Random, of: list[int] | None = None) -> None:
    """Take a random range out of some rows."""
    numbers = list(range(rows.cache.batch_size)) if of is None else of
    least, sinks = min(rows.cache.held[numbers].tolist()), rows.cache.sinks
    if least > sinks:
        start, stop = sorted(draw.randint(sinks, least) for _ in range(2))
        rows.evict_range(start, stop, of)


def run_at_random(rows: EvictingRows, seed: int, turns: int = 12) -> float:
    """Feeds in all ways, evictions, rewinds, in random order."""
    draw, batch = random.Random(seed), rows.cache.batch_size
    for turn in range(turns):
        length = draw.choice([1, 1, 2, 5, draw.randint(1, 2 * rows.cache.window)])
        if batch > 1 and draw.random() < 0.4:
            rows.feed(
                random_tokens(length, batch, seed=seed * 100 + turn),
                [draw.randint(0, length) for _ in range(batch)],
            )
        else:
            feed(rows, length, seed * 100 + turn, split=draw.random() < 0.5)
        some = None if draw.random() < 0.5 else draw.sample(range(batch), draw.randint(1, batch))
        kind = draw.random()
        if kind < 0.6:
            evict_some(rows, draw, some)
        elif kind < 0.75:
            rows.evict_for_space(draw.randint(0, min(rows.cache.window, *rows.streams[0].windows)), some)
        elif kind < 0.9:
            limit = min(rows.cache.rewindable[range(batch) if some is None else some].tolist())
            rows.rewind(draw.randint(0, limit), some)
    feed(rows, 2 * rows.cache.window, seed)
    return rows.worst


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_every_family_equals_the_definition_after_evictions(name, sinks):
    model = tiny_model(name)
    for seed, (window, origin) in enumerate([(9, 0), (14, 0), (9, 10**9)]):
        rows = EvictingRows(model, SinkCache(model, sinks, window, origin=origin, chunk=7))
        assert run_at_random(rows, seed) <= TOLERANCE
