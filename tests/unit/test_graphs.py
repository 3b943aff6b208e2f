"""The step that CUDA graphs capture, with a stand-in that runs what would be replayed: its laws need no GPU."""

from __future__ import annotations

import gc
import importlib

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from tests.laws.scenarios import TOLERANCE, cuts, defined, error, feed, mixed, text, tiny
from tests.laws.test_families import CONFIGS
from tests.laws.test_families import tiny as of_family

COMPILE = importlib.import_module("streamllm.compile")  # `streamllm.compile` is the function
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

    monkeypatch.setattr(COMPILE, "_captured", captured)
    monkeypatch.setattr(COMPILE, "CAPTURING", ("cpu",))
    return count


@pytest.mark.parametrize("origin", [0, 10**9])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sinks", "window"), SHAPES)
def test_one_by_one_keeps_the_definition(replays, sinks, window, rows, origin) -> None:
    model = streamllm.compile(tiny(), "cudagraphs")
    tokens = text(70, rows)
    cache = SinkCache(model, sinks, window, rows, origin=origin)
    with torch.inference_mode():
        got = feed(model, cache, tokens)
    assert error(got, defined(tiny(), tokens, sinks, window)) <= TOLERANCE
    assert model.recordings == 1
    assert replays == [70 - sinks - window]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_streams_past_eviction(replays, name: str) -> None:
    plain = of_family(name)
    model, tokens = streamllm.compile(plain, "cudagraphs"), text(45)
    for sinks, window, origin in [(3, 9, 0), (0, 5, 0), (2, 4, 10**9)]:
        cache = SinkCache(model, sinks, window, origin=origin)
        got = feed(model, cache, tokens)
        assert error(got, feed(plain, SinkCache(plain, sinks, window, origin=origin), tokens)) <= TOLERANCE
    assert replays[0] == 3 * 45 - 3 - 9 - 5 - 2 - 4


def test_what_is_planned_from_a_number_is_what_is_planned_with_it() -> None:
    for model in (tiny(), of_family("qwen2, three windows")):
        for sinks, window, origin in [(0, 1, 0), (0, 5, 7), (4, 1, 0), (4, 6, 10**9), (1, 30, 0)]:
            cache = SinkCache(model, sinks, window, origin=origin, chunk=1000)
            model(text(sinks + window), cache)
            for t in range(sinks + window, sinks + window + 40):
                plan, other = cache.plan(1), cache.planned(torch.tensor([t]))
                assert cache.plan(1, counted=True).t == t
                for own, step in plan.steps.items():
                    for field in ("slots", "near", "far", "own", "keys", "visible", "sinks", "span"):
                        wanted, got = getattr(step, field), getattr(other.steps[own], field)
                        same = torch.equal if isinstance(wanted, torch.Tensor) else lambda a, b: a == b
                        assert same(wanted, got), (field, wanted, got)
                model(text(1, seed=t), cache)


def test_nothing_of_it_is_looked_at() -> None:
    """A tensor on "meta" has no values: who asks for one gets an error."""
    for model in (tiny.__wrapped__(dtype=torch.float32), of_family.__wrapped__("mpt").float()):
        model = model.to("meta")
        cache = SinkCache(model, 2, 6)
        token = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        x = model.hidden(token, cache.planned(torch.zeros(1, dtype=torch.int64, device="meta")))
        assert x.shape[:2] == (1, 1)


def test_single_tokens_between_chunks_and_ragged_rows() -> None:
    model = streamllm.compile(tiny(), "cudagraphs")
    rows = mixed(model)
    rows.restart([0, 1, 2])
    rows.feed(text(12, 3, seed=7))
    rows.feed(text(1, 3, seed=8))
    rows.model = tiny()  # whose weights the reference reads
    assert rows.error() <= TOLERANCE
    assert model.recordings == 1


def test_a_graph_is_of_one_cache_and_goes_with_it() -> None:
    model, tokens = streamllm.compile(tiny(), "cudagraphs"), text(40, rows=2)
    caches = [SinkCache(model, 2, 5), SinkCache(model, 2, 5), SinkCache(model, 4, 6, origin=9)]
    got = [[], [], []]
    for part in tokens[:1].split(cuts(40, seed=3, longest=3), 1):
        for cache, logits in zip(caches, got, strict=True):
            logits.append(model(part, cache))
    for cache, logits in zip(caches, got, strict=True):
        wanted = defined(tiny(), tokens[:1], cache.sinks, cache.window)
        assert error(torch.cat(logits, 1), wanted) <= TOLERANCE
    assert model.recordings == len(model._numbered) == 3
    del cache, caches[1:]
    gc.collect()
    assert len(model._numbered) == 1


def test_an_interrupted_replay_leaves_the_stream_where_it_stood(monkeypatch) -> None:
    model, tokens = streamllm.compile(tiny(), "cudagraphs"), text(40)
    cache = SinkCache(model, 2, 5)
    model(tokens[:, :20], cache)
    for at in (20, 21, 25):
        model(tokens[:, int(cache.seen[0]) : at], cache) if at > 20 else None
        with monkeypatch.context() as patch:
            patch.setattr(model, "project", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(text(1, seed=at), cache)
        assert cache.seen.tolist() == [at]
    model(text(1, seed=9), cache)
    cache.step_back()
    got = feed(model, cache, tokens[:, 25:])
    assert error(got, defined(tiny(), tokens, 2, 5)[:, 25:]) <= TOLERANCE


def test_only_what_somebody_reads_is_captured(monkeypatch) -> None:
    graphs = []
    bare = COMPILE._bare
    monkeypatch.setattr(COMPILE, "_bare", lambda module: graphs.append(module.graph) or bare(module))
    for model, asked in ((tiny(), False), (of_family("mpt"), True)):
        compiled = streamllm.compile(model, "cudagraphs")
        feed(compiled, SinkCache(compiled, 2, 5), text(9))
        nodes = graphs.pop().nodes
        assert any(node.target is torch.where for node in nodes) == asked  # the places of keys
        copies = [node for node in nodes if node.target == "index_copy_"]
        assert len(copies) == 6  # keys and values of three layers


@pytest.mark.parametrize("config", [{}, {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.2}])
def test_a_stream_that_runs_ahead_on_graphs_says_the_same(monkeypatch, replays, config) -> None:
    monkeypatch.setattr(importlib.import_module("streamllm.generate"), "AHEAD", ("cpu",))
    model, prompt = streamllm.compile(tiny(), "cudagraphs"), text(12)[0]
    cache, plain = SinkCache(model, 2, 6), SinkCache(tiny(), 2, 6)
    for count in (20, 1, 9):
        said = list(streamllm.generate(model, prompt, cache, max_new_tokens=count, **config))
        monkeypatch.setattr(importlib.import_module("streamllm.generate"), "AHEAD", ())
        assert said == list(streamllm.generate(tiny(), prompt, plain, max_new_tokens=count, **config))
        monkeypatch.setattr(importlib.import_module("streamllm.generate"), "AHEAD", ("cpu",))
        assert cache.seen.tolist() == plain.seen.tolist()
        prompt = said[-1:]
    assert replays[0] >= 27
    assert model.recordings == 1


def test_what_torch_compile_makes_of_it_is_captured_too(monkeypatch, replays) -> None:
    """As "inductor" does on CUDA; here with a backend that compiles nothing, but takes the same apart."""
    monkeypatch.setattr(
        COMPILE, "_fused", lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    )
    torch._dynamo.reset()
    model, tokens = streamllm.compile(tiny(), "inductor"), text(30)
    model._captures, model._by_dots = lambda tokens: True, lambda tokens: False
    try:
        for inference in (True, False):
            with torch.inference_mode(inference):
                got = feed(model, SinkCache(model, 2, 5), tokens, [1] * 12 + [5] + [1] * 13)
            assert error(got, defined(tiny(), tokens, 2, 5)) <= TOLERANCE
    finally:
        torch._dynamo.reset()
    assert replays == [2 * (30 - 7 - 5)]
