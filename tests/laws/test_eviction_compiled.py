"""The law of eviction for compiled steps: the recordings of a stream serve it after any eviction, too."""

from __future__ import annotations

import pytest

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import api, cpu_loops, cuda, library
from tests.laws.evicting import EvictingRows
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import TOLERANCE, random_tokens, tiny_llama


def test_a_cache_has_a_gap_until_new_tokens_have_filled_it():
    model = tiny_llama()
    cache = SinkCache(model, 2, 12, 2)
    model(random_tokens(30, 2), cache)
    assert not cache.has_gap
    cache.evict_range(4, 7, [1])
    gaps = []
    for seed in range(4):
        gaps.append(cache.has_gap)
        model(random_tokens(1, 2, seed=seed), cache)
    assert gaps == [True, True, False, False]  # the next token takes the last place of the room itself


def token_by_token(rows: EvictingRows, count: int, seed: int) -> None:
    for part in random_tokens(count, rows.cache.batch_size, seed=seed).split(1, 1):
        rows.feed(part)


def evict_and_go_on(rows: EvictingRows) -> None:
    """From an empty window: evictions while it fills and once it is full, in all rows and in one."""
    token_by_token(rows, 11, seed=1)
    rows.evict_range(5, 8)
    token_by_token(rows, 4, seed=2)
    for seed, (start, stop) in enumerate([(3, 5), (9, 12), (2, 6), (6, 7), (2, 9)]):
        token_by_token(rows, 20, seed=10 + seed)
        held = int(rows.cache.held.min())
        rows.evict_range(min(start, held), min(stop, held))
        token_by_token(rows, 2, seed=20 + seed)
        rows.evict_range(3, 4, [0])
        rows.feed(random_tokens(3, rows.cache.batch_size, seed=30 + seed))  # a chunk between recorded steps
        token_by_token(rows, 2, seed=40 + seed)
    rows.evict_for_space(5)
    token_by_token(rows, 20, seed=50)


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps of backend="inductor" are rewritten, and run without a compiler."""

    def not_compiled(module, inputs):
        cpu_loops.as_sums(module, inputs)
        return lambda *inputs: module(*inputs)[0]

    monkeypatch.setattr(library, "check", lambda: None)
    monkeypatch.setattr(cpu_loops, "compiled", not_compiled)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("backend", "batch"), [("flat", 1), ("flat", 2), ("inductor", 1), ("inductor", 2)])
def test_recordings_serve_streams_after_evictions(name, backend, batch, uncompiled):
    plain = tiny_model.__wrapped__(name)
    model = streamllm.compile(plain, backend)
    rows = EvictingRows(model, SinkCache(model, 2, 12, batch), tiny_model(name))
    evict_and_go_on(rows)
    assert rows.worst <= TOLERANCE
    # As without evictions: one filling, one more for each distinct window that is full (one in all for inductor). With
    # two rows once for rows that agree, and once for others.
    kinds = 1 + len(set(plain.geometry.windows)) if backend == "flat" else 1
    assert model.recordings <= kinds * batch


def test_a_step_captured_in_a_graph_serves_streams_after_evictions(monkeypatch):
    monkeypatch.setattr(api, "CAPTURABLE", ("cpu",))
    monkeypatch.setattr(cuda, "capture", lambda function, device: function)
    model = streamllm.compile(tiny_llama.__wrapped__(), "cudagraphs")
    rows = EvictingRows(model, SinkCache(model, 2, 12, 2), tiny_llama())
    evict_and_go_on(rows)
    assert rows.worst <= TOLERANCE
    assert model.recordings <= 4


@pytest.mark.parametrize("name", ["qwen2, three windows"])
def test_a_compiled_function_serves_streams_after_evictions(name):
    model = streamllm.compile(tiny_model.__wrapped__(name), "inductor")
    rows = EvictingRows(model, SinkCache(model, 2, 12), tiny_model(name))
    evict_and_go_on(rows)
    assert rows.worst <= TOLERANCE
    assert model.recordings == 1
