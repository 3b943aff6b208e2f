"""streamllm.compile with backend "flat": the laws of streaming, and how often a step is recorded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled.recorder import Recorder
from streamllm.models.linear import arrange
from tests.laws.scenarios import (
    TOLERANCE,
    Rows,
    error,
    feed,
    feed_mixed_chunks,
    random_tokens,
    reference_logits,
    tiny_llama,
)

SINKS_AND_WINDOWS = [(0, 1), (0, 5), (4, 1), (4, 6), (8, 3), (1, 30)]


def expected_recordings(sinks, window) -> int:
    """One for a filling window and one for a full one, for windows below one read step of the ring."""
    return 1 if sinks + window == 1 else 2


@pytest.mark.parametrize("origin", [0, 10**9])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_token_by_token_equals_the_definition(sinks, window, rows, origin):
    model = streamllm.compile(tiny_llama(), "flat")
    tokens = random_tokens(70, rows)
    cache = SinkCache(model, sinks, window, rows, origin=origin)
    with torch.inference_mode():
        got = feed(model, cache, tokens)
    assert error(got, reference_logits(tiny_llama(), tokens, sinks, window)) <= TOLERANCE
    assert model.recordings == expected_recordings(sinks, window)


@pytest.mark.parametrize("rope", ["default", "yarn", "dynamic", "partial, odd"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_every_rope_and_number_of_key_heads_equals_the_definition(rope, kv_heads):
    plain = tiny_llama(rope, kv_heads=kv_heads)
    tokens = random_tokens(60)
    model = streamllm.compile(plain, "flat")
    got = feed(model, SinkCache(model, 4, 9), tokens)
    assert error(got, reference_logits(plain, tokens, 4, 9)) <= TOLERANCE


def test_single_tokens_between_chunks_and_ragged_rows_equal_the_definition():
    model = streamllm.compile(tiny_llama(), "flat")
    rows = feed_mixed_chunks(model)
    rows.model = tiny_llama()  # the reference reads its weights
    assert rows.error() <= TOLERANCE
    # One for rows in lockstep, one for rows at different places, one while a row fills again.
    assert model.recordings == 3


def test_a_ragged_batch_is_recorded_twice():
    model = streamllm.compile(tiny_llama(), "flat")
    rows = Rows(model, SinkCache(model, 4, 30, 8))
    rows.feed(random_tokens(40, 8), [40, 3, 9, 17, 1, 30, 38, 2])
    for seed in range(60):
        rows.feed(random_tokens(1, 8, seed=seed + 1))
    rows.model = tiny_llama()
    assert rows.error() <= TOLERANCE
    assert model.recordings == 2  # before and after all of them are full


def test_a_stream_with_a_long_window_is_recorded_three_times():
    """A token reads 256 slots with a mask, later 1,024 slots with a mask, and 1,024 without one when all are full."""
    model = streamllm.compile(tiny_llama(layers=1), "flat")
    tokens = random_tokens(1100)
    with torch.inference_mode():
        got = feed(model, SinkCache(model, 4, 1020), tokens)
        wanted = tiny_llama(layers=1)(tokens, SinkCache(model, 4, 1020))
    assert error(got, wanted) <= TOLERANCE
    assert model.recordings == 3


def test_caches_of_the_same_sizes_share_recordings():
    model = streamllm.compile(tiny_llama(), "flat")
    tokens = random_tokens(40)
    for seed, (sinks, window) in enumerate([(2, 5), (2, 5), (4, 6), (2, 5)]):
        cache = SinkCache(model, sinks, window, origin=seed)
        got = feed(model, cache, tokens)
        assert error(got, reference_logits(tiny_llama(), tokens, sinks, window)) <= TOLERANCE
    assert model.recordings == 4  # two sizes, each filling and full


def test_caches_that_differ_only_in_s_plus_w_do_not_share_recordings():
    """All layers keep 5 tokens, but the frequencies of "dynamic" depend on S + W."""
    plain = tiny_llama("dynamic", layers=1, windows=(5,))
    model = streamllm.compile(plain, "flat")
    tokens = random_tokens(60)
    for window in (9, 45):
        got = feed(model, SinkCache(model, 4, window), tokens)
        assert error(got, feed(plain, SinkCache(plain, 4, window), tokens)) <= TOLERANCE


def test_a_step_is_bound_to_its_cache_once(monkeypatch):
    model = streamllm.compile(tiny_llama.__wrapped__(), "flat")
    bind, bound = model._bind, []
    monkeypatch.setattr(model, "_bind", lambda *args: bound.append(args) or bind(*args))
    cache = SinkCache(model, 2, 3)
    feed(model, cache, random_tokens(20))
    for weight in model.parameters():  # recording fuses them anew, which drops older recordings
        weight.data = weight.data.clone()
    feed(model, cache, random_tokens(20))
    assert len(bound) == model.recordings == 3


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.0), (torch.float16, 0.0)], ids=str
)
def test_a_compiled_model_equals_the_model(dtype, tolerance):
    plain, other = (tiny_llama.__wrapped__(dtype=dtype) for _ in range(2))
    arrange(other)
    compiled = streamllm.compile(other, "flat")
    tokens = random_tokens(80)
    with torch.inference_mode():
        wanted = feed(plain, SinkCache(plain, 4, 12), tokens)
        eager = feed(other, SinkCache(other, 4, 12), tokens)
        cache = SinkCache(compiled, 4, 12)
        got = feed(compiled, cache, tokens)
        cache.reset()
        chunks = feed(compiled, cache, tokens, [3, 40, 1, 36])  # with weights that compilation has fused
    assert error(got.float(), eager.float()) <= tolerance
    if dtype == torch.float32:
        assert error(got, wanted) <= tolerance
        assert error(chunks, wanted) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "threads"), [(torch.float64, 1), (torch.float32, 1), (torch.float32, 2)], ids=str
)
def test_fusing_does_not_change_the_weights_or_their_size(threaded, dtype, threads):
    threaded(threads)
    plain, model = tiny_llama.__wrapped__(dtype=dtype), tiny_llama.__wrapped__(dtype=dtype)
    arrange(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    compiled = streamllm.compile(model, "flat")
    for sinks in (2, 3):  # the second cache is recorded again, with the same fused weights
        feed(compiled, SinkCache(compiled, sinks, 3), random_tokens(20))
    assert compiled.recordings == 4
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    bytes_of = lambda model: sum(  # noqa: E731
        {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in model.parameters()}.values()
    )
    assert bytes_of(model) == bytes_of(plain)  # q, k and v share one storage, without a second copy
    assert len({layer.attention.k.weight.untyped_storage().data_ptr() for layer in model.layers}) == 3
    first = model.layers[0].attention
    storages = [part.weight.untyped_storage().data_ptr() for part in (first.q, first.k, first.v)]
    assert storages[1] == storages[2]
    # On one thread, float32 queries are stored by columns, keys and values (which are fewer) by rows.
    assert (storages[0] == storages[1]) == (dtype == torch.float64 or threads == 2)


def test_a_compiled_model_can_be_used_like_the_model():
    model = tiny_llama()
    compiled = streamllm.compile(model)
    generated = list(
        streamllm.generate(compiled, random_tokens(20)[0], SinkCache(compiled, 2, 6), max_new_tokens=30)
    )
    assert generated == list(
        streamllm.generate(model, random_tokens(20)[0], SinkCache(model, 2, 6), max_new_tokens=30)
    )
    assert compiled.recordings == 1
    assert compiled.config is model.config
    assert streamllm.compile(compiled).model is model


def test_other_models_and_unknown_backends_are_refused():
    with pytest.raises(TypeError, match="not a model of this library"):
        streamllm.compile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend must be one of auto, flat"):
        streamllm.compile(tiny_llama(), backend="llvm")


def test_a_recording_is_a_function_of_its_inputs():
    weight, cache = torch.randn(3, 3), torch.zeros(2, 3)

    def function(x, slot):
        y = x.to(x.dtype) @ weight  # a conversion without effect, which is not recorded
        cache.index_copy_(0, slot, y)
        low, high = cache.split(1)
        cache[..., 0] = 7
        return low + 2 * high.view(1, 3)

    inputs = torch.randn(1, 3), torch.tensor([1])
    with Recorder(inputs) as recorder:
        result = function(*inputs)
    flat = recorder.finish(result)
    x, slot = torch.randn(1, 3), torch.tensor([0])
    got = flat(x, slot)
    after = cache.clone()
    assert torch.equal(got, function(x, slot))
    assert torch.equal(cache, after)
    assert not any(node.target == "to" for node in flat.graph.nodes)
