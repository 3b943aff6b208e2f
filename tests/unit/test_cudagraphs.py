"""backend="cudagraphs" without a GPU: a stand-in for graphs runs the captured function at every replay."""

from __future__ import annotations

import gc
import operator

import pytest
import torch

import streamllm
from streamllm import loop
from streamllm.cache import SinkCache
from streamllm.compiled import api, cuda, fusion
from tests.laws.families import CONFIGS, tiny_model
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

SINKS_AND_WINDOWS = [(0, 1), (0, 5), (4, 1), (4, 6), (8, 3), (1, 30)]


@pytest.fixture(autouse=True)
def replays(monkeypatch) -> list[int]:
    """Replaces CUDA graphs. Like a graph, a replay runs only the captured function and writes to the same result.

    Returns a list with the number of replays.
    """
    count = [0]

    def capture(function, device):
        assert device.type == "cpu"
        for _ in range(3):
            result = function()
        result = result.clone()

        def replay():
            count[0] += 1
            return result.copy_(function())

        return replay

    monkeypatch.setattr(cuda, "capture", capture)
    monkeypatch.setattr(api, "CAPTURABLE", ("cpu",))
    return count


@pytest.mark.parametrize("origin", [0, 10**9])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_token_by_token_equals_the_definition(replays, sinks, window, rows, origin) -> None:
    model = streamllm.compile(tiny_llama(), "cudagraphs")
    tokens = random_tokens(70, rows)
    cache = SinkCache(model, sinks, window, rows, origin=origin)
    with torch.inference_mode():
        got = feed(model, cache, tokens)
    assert error(got, reference_logits(tiny_llama(), tokens, sinks, window)) <= TOLERANCE
    assert model.recordings == (1 if sinks + window == 1 else 2)  # a filling window and a full one
    assert replays == [70]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_the_model_past_eviction(replays, name: str) -> None:
    plain = tiny_model(name)
    model, tokens = streamllm.compile(plain, "cudagraphs"), random_tokens(45)
    for sinks, window, origin in [(3, 9, 0), (0, 5, 0), (2, 4, 10**9)]:
        cache = SinkCache(model, sinks, window, origin=origin)
        got = feed(model, cache, tokens)
        assert error(got, feed(plain, SinkCache(plain, sinks, window, origin=origin), tokens)) <= TOLERANCE
    assert replays[0] == 3 * 45


@pytest.mark.parametrize("for_any_place", [False, True])
def test_a_recorded_plan_equals_the_plan_of_a_forward(for_any_place) -> None:
    """Places and visible keys are equal. A recorded plan may read more slots, which are masked."""
    for model in (tiny_llama(), tiny_model("qwen2, three windows")):
        for sinks, window, origin in [(0, 1, 0), (0, 5, 7), (4, 1, 0), (4, 6, 10**9), (1, 30, 0)]:
            cache = SinkCache(model, sinks, window, origin=origin)
            for t in range(sinks + window + 30):
                kinds = cache.token_kinds(recorded=True, for_any_place=for_any_place)
                plan = cache.plan(1)
                other = cache.plan_token(torch.tensor([t]), kinds, torch.tensor([origin]))
                for sliding, step in plan.steps.items():
                    got = other.steps[sliding]
                    for field in ("slots", "query_place", "sink_query_place", "new_key_place", "rope_length"):
                        wanted = getattr(step, field)
                        equal = torch.equal if isinstance(wanted, torch.Tensor) else operator.eq
                        assert equal(wanted, getattr(got, field)), field
                    assert visible_distances(got) == visible_distances(step)
                model(random_tokens(1, seed=t), cache)


def visible_distances(step) -> list[int]:
    mask = step.mask()
    distance = step.distance()
    return sorted((distance if mask is None else distance[mask]).flatten().tolist())


def test_a_recorded_plan_reads_no_values() -> None:
    """A tensor on "meta" has no values: reading one raises."""
    for model in (tiny_llama.__wrapped__(dtype=torch.float32), tiny_model.__wrapped__("mpt").float()):
        model = model.to("meta")
        for rows in (1, 3):
            cache = SinkCache(model, 2, 6, rows)
            tokens = torch.zeros(rows, 1, dtype=torch.int64, device="meta")
            places = torch.zeros(rows, dtype=torch.int64, device="meta")
            x = model.hidden(tokens, cache.plan_token(places, cache.token_kinds(recorded=True)))
            assert x.shape[:2] == (rows, 1)


def test_single_tokens_between_chunks_and_ragged_rows_equal_the_definition() -> None:
    model = streamllm.compile(tiny_llama(), "cudagraphs")
    rows = feed_mixed_chunks(model)
    rows.restart([0, 1, 2])
    rows.feed(random_tokens(12, 3, seed=7))
    rows.feed(random_tokens(1, 3, seed=8))
    rows.model = tiny_llama()  # the reference reads its weights
    assert rows.error() <= TOLERANCE
    # One for rows in lockstep, one for rows at different places, one while a row fills again.
    assert model.recordings == 3


def test_graphs_belong_to_one_cache_and_are_freed_with_it() -> None:
    model, tokens = streamllm.compile(tiny_llama(), "cudagraphs"), random_tokens(40, rows=2)
    caches = [SinkCache(model, 2, 5), SinkCache(model, 2, 5), SinkCache(model, 4, 6, origin=9)]
    got = [[], [], []]
    for part in tokens[:1].split(random_split(40, seed=3, longest=3), 1):
        for cache, logits in zip(caches, got, strict=True):
            logits.append(model(part, cache))
    for cache, logits in zip(caches, got, strict=True):
        wanted = reference_logits(tiny_llama(), tokens[:1], cache.sinks, cache.window)
        assert error(torch.cat(logits, 1), wanted) <= TOLERANCE
    assert model.recordings == 4  # two sizes, each filling and full
    assert len(model._bound) == 3
    del cache, caches[1:]
    gc.collect()
    assert len(model._bound) == 1


def test_a_failed_capture_does_not_change_the_stream(monkeypatch) -> None:
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


def test_places_of_keys_are_captured_only_for_alibi(monkeypatch) -> None:
    graphs = []
    flat = fusion.flat_function
    monkeypatch.setattr(fusion, "flat_function", lambda module: graphs.append(module.graph) or flat(module))
    for model, needed in ((tiny_llama(), False), (tiny_model("mpt"), True)):
        compiled = streamllm.compile(model, "cudagraphs")
        feed(compiled, SinkCache(compiled, 2, 5), random_tokens(9), [8, 1])
        nodes = graphs.pop().nodes
        assert any(node.target is torch.where for node in nodes) == needed  # computes the places of keys
        copies = [node for node in nodes if node.target == "index_copy_"]
        assert len(copies) == 6  # keys and values of three layers


@pytest.mark.parametrize("config", [{}, {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.2}])
def test_running_ahead_on_graphs_generates_the_same_tokens(monkeypatch, replays, config) -> None:
    monkeypatch.setattr(loop, "RUN_AHEAD", ("cpu",))
    model, prompt = streamllm.compile(tiny_llama(), "cudagraphs"), random_tokens(12)[0]
    cache, plain = SinkCache(model, 2, 6), SinkCache(tiny_llama(), 2, 6)
    for count in (20, 1, 9):
        generated = list(streamllm.generate(model, prompt, cache, max_new_tokens=count, **config))
        monkeypatch.setattr(loop, "RUN_AHEAD", ())
        assert generated == list(
            streamllm.generate(tiny_llama(), prompt, plain, max_new_tokens=count, **config)
        )
        monkeypatch.setattr(loop, "RUN_AHEAD", ("cpu",))
        assert cache.seen.tolist() == plain.seen.tolist()
        prompt = generated[-1:]
    assert replays[0] >= 27
    assert model.recordings == 1  # the prompt fills the window


def test_a_step_compiled_by_torch_is_captured_too(monkeypatch, replays) -> None:
    """As "inductor" does on CUDA, here with the torch.compile backend "aot_eager", which generates no code."""
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
