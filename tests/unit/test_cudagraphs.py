"""The step that CUDA graphs capture, with a stand-in that runs what would be replayed: its laws need no GPU."""

from __future__ import annotations

import gc

import pytest
import torch

import streamllm
from streamllm import generation
from streamllm.cache import SinkCache
from streamllm.compiled import api, cuda, fusion
from tests.laws.scenarios import (
    TOLERANCE,
    error,
    feed,
    feed_mixed_chunks,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)
from tests.laws.test_families import CONFIGS
from tests.laws.test_families import tiny_model as of_family

SHAPES = [(0, 1), (0, 5), (4, 1), (4, 6), (8, 3), (1, 30)]


@pytest.fixture(autouse=True)
def replays(monkeypatch) -> list[int]:
    """As a graph: after the capture, nothing but what was captured runs, and the result keeps its place."""
    count = [0]

    def captured(function, device):
        assert device.type == "cpu"
        for _ in range(3):
            result = function()
        result = result.clone()

        def replay():
            count[0] += 1
            return result.copy_(function())

        return replay

    monkeypatch.setattr(cuda, "capture", captured)
    monkeypatch.setattr(api, "CAPTURABLE", ("cpu",))
    return count


@pytest.mark.parametrize("origin", [0, 10**9])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sinks", "window"), SHAPES)
def test_one_by_one_keeps_the_definition(replays, sinks, window, rows, origin) -> None:
    model = streamllm.compile(tiny_llama(), "cudagraphs")
    tokens = random_tokens(70, rows)
    cache = SinkCache(model, sinks, window, rows, origin=origin)
    with torch.inference_mode():
        got = feed(model, cache, tokens)
    assert error(got, reference_logits(tiny_llama(), tokens, sinks, window)) <= TOLERANCE
    assert model.recordings == (1 if sinks + window == 1 else 2)  # filling, and full
    assert replays == [70]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_streams_past_eviction(replays, name: str) -> None:
    plain = of_family(name)
    model, tokens = streamllm.compile(plain, "cudagraphs"), random_tokens(45)
    for sinks, window, origin in [(3, 9, 0), (0, 5, 0), (2, 4, 10**9)]:
        cache = SinkCache(model, sinks, window, origin=origin)
        got = feed(model, cache, tokens)
        assert error(got, feed(plain, SinkCache(plain, sinks, window, origin=origin), tokens)) <= TOLERANCE
    assert replays[0] == 3 * 45


@pytest.mark.parametrize("for_any_place", [False, True])
def test_a_recorded_plan_gives_what_the_plan_of_a_forward_gives(for_any_place) -> None:
    """Places, and what is visible; it may read more slots, of which the rest is hidden."""
    for model in (tiny_llama(), of_family("qwen2, three windows")):
        for sinks, window, origin in [(0, 1, 0), (0, 5, 7), (4, 1, 0), (4, 6, 10**9), (1, 30, 0)]:
            cache = SinkCache(model, sinks, window, origin=origin)
            for t in range(sinks + window + 30):
                kinds = cache.token_kinds(recorded=True, for_any_place=for_any_place)
                plan = cache.plan(1)
                other = cache.plan_token(torch.tensor([t]), kinds, torch.tensor([origin]))
                for own, step in plan.steps.items():
                    got = other.steps[own]
                    for field in ("slots", "query_place", "sink_query_place", "new_key_place", "rope_length"):
                        wanted = getattr(step, field)
                        same = torch.equal if isinstance(wanted, torch.Tensor) else lambda a, b: a == b
                        assert same(wanted, getattr(got, field)), field
                    assert seen_distances(got) == seen_distances(step)
                model(random_tokens(1, seed=t), cache)


def seen_distances(step) -> list[int]:
    mask = step.mask()
    distance = step.distance()
    return sorted((distance if mask is None else distance[mask]).flatten().tolist())


def test_a_recorded_plan_reads_no_values() -> None:
    """A tensor on "meta" has no values: reading one raises."""
    for model in (tiny_llama.__wrapped__(dtype=torch.float32), of_family.__wrapped__("mpt").float()):
        model = model.to("meta")
        for rows in (1, 3):
            cache = SinkCache(model, 2, 6, rows)
            tokens = torch.zeros(rows, 1, dtype=torch.int64, device="meta")
            places = torch.zeros(rows, dtype=torch.int64, device="meta")
            x = model.hidden(tokens, cache.plan_token(places, cache.token_kinds(recorded=True)))
            assert x.shape[:2] == (rows, 1)


def test_single_tokens_between_chunks_and_ragged_rows() -> None:
    model = streamllm.compile(tiny_llama(), "cudagraphs")
    rows = feed_mixed_chunks(model)
    rows.restart([0, 1, 2])
    rows.feed(random_tokens(12, 3, seed=7))
    rows.feed(random_tokens(1, 3, seed=8))
    rows.model = tiny_llama()  # whose weights the reference reads
    assert rows.error() <= TOLERANCE
    assert model.recordings == 3  # rows in lockstep, rows at different places, rows of which one fills again


def test_a_graph_is_of_one_cache_and_goes_with_it() -> None:
    model, tokens = streamllm.compile(tiny_llama(), "cudagraphs"), random_tokens(40, rows=2)
    caches = [SinkCache(model, 2, 5), SinkCache(model, 2, 5), SinkCache(model, 4, 6, origin=9)]
    got = [[], [], []]
    for part in tokens[:1].split(random_split(40, seed=3, longest=3), 1):
        for cache, logits in zip(caches, got, strict=True):
            logits.append(model(part, cache))
    for cache, logits in zip(caches, got, strict=True):
        wanted = reference_logits(tiny_llama(), tokens[:1], cache.sinks, cache.window)
        assert error(torch.cat(logits, 1), wanted) <= TOLERANCE
    assert model.recordings == 4  # two sizes, filling and full
    assert len(model._bound) == 3
    del cache, caches[1:]
    gc.collect()
    assert len(model._bound) == 1


def test_an_interrupted_replay_leaves_the_stream_where_it_stood(monkeypatch) -> None:
    model, tokens = streamllm.compile(tiny_llama(), "cudagraphs"), random_tokens(40)
    cache = SinkCache(model, 2, 5)
    model(tokens[:, :20], cache)
    for at in (20, 21, 25):
        model(tokens[:, int(cache.seen[0]) : at], cache) if at > 20 else None
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "capture", lambda *_: 1 / 0)
            model._bound.clear()
            with pytest.raises(ZeroDivisionError):
                model(random_tokens(1, seed=at), cache)
        assert cache.seen.tolist() == [at]
    model(random_tokens(1, seed=9), cache)
    cache.step_back()
    got = feed(model, cache, tokens[:, 25:])
    assert error(got, reference_logits(tiny_llama(), tokens, 2, 5)[:, 25:]) <= TOLERANCE


def test_places_of_keys_are_captured_only_where_a_bias_needs_them(monkeypatch) -> None:
    graphs = []
    flat = fusion.flat_function
    monkeypatch.setattr(fusion, "flat_function", lambda module: graphs.append(module.graph) or flat(module))
    for model, asked in ((tiny_llama(), False), (of_family("mpt"), True)):
        compiled = streamllm.compile(model, "cudagraphs")
        feed(compiled, SinkCache(compiled, 2, 5), random_tokens(9), [8, 1])
        nodes = graphs.pop().nodes
        assert any(node.target is torch.where for node in nodes) == asked  # the places of keys
        copies = [node for node in nodes if node.target == "index_copy_"]
        assert len(copies) == 6  # keys and values of three layers


@pytest.mark.parametrize("config", [{}, {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.2}])
def test_a_stream_that_runs_ahead_on_graphs_says_the_same(monkeypatch, replays, config) -> None:
    monkeypatch.setattr(generation, "RUN_AHEAD", ("cpu",))
    model, prompt = streamllm.compile(tiny_llama(), "cudagraphs"), random_tokens(12)[0]
    cache, plain = SinkCache(model, 2, 6), SinkCache(tiny_llama(), 2, 6)
    for count in (20, 1, 9):
        said = list(streamllm.generate(model, prompt, cache, max_new_tokens=count, **config))
        monkeypatch.setattr(generation, "RUN_AHEAD", ())
        assert said == list(streamllm.generate(tiny_llama(), prompt, plain, max_new_tokens=count, **config))
        monkeypatch.setattr(generation, "RUN_AHEAD", ("cpu",))
        assert cache.seen.tolist() == plain.seen.tolist()
        prompt = said[-1:]
    assert replays[0] >= 27
    assert model.recordings == 1  # the prompt fills the window


def test_what_torch_compile_makes_of_it_is_captured_too(monkeypatch, replays) -> None:
    """As "inductor" does on CUDA; here with a backend that compiles nothing, but takes the same apart."""
    monkeypatch.setattr(
        api, "_by_inductor", lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    )
    torch._dynamo.reset()
    model, tokens = streamllm.compile(tiny_llama(), "inductor"), random_tokens(30)
    model._is_captured, model._uses_loops = lambda device: True, lambda device: False
    try:
        for inference in (True, False):
            with torch.inference_mode(inference):
                got = feed(model, SinkCache(model, 2, 5), tokens, [1] * 12 + [5] + [1] * 13)
            assert error(got, reference_logits(tiny_llama(), tokens, 2, 5)) <= TOLERANCE
    finally:
        torch._dynamo.reset()
    assert replays == [2 * (30 - 5)]
