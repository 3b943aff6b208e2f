"""The law of a cache in int8: keys and values are rounded once, when they are appended.

In float64, against the definition with the same rounding.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache, int8_ring, ring
from streamllm.compiled import library
from tests.laws import families
from tests.laws.allocated import Allocated
from tests.laws.scenarios import (
    TOLERANCE,
    Interrupted,
    Rows,
    error,
    failing,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)

S, W = 4, 6
SINKS_AND_WINDOWS = [(0, 1), (0, 5), (4, 6), (4, 1), (8, 3), (2, 100)]


def int8_cache(model, *sizes, **options):
    return SinkCache(model, *sizes, quantize="int8", **options)


def one_by_one(sinks=S, window=W):
    model, tokens = tiny_llama(), random_tokens(40)
    return error(
        feed(model, int8_cache(model, sinks, window), tokens),
        reference_logits(model, tokens, sinks, window, int8=True),
    )


def in_chunks(sinks=S, window=W):
    model, tokens = tiny_llama(), random_tokens(40)
    wanted = reference_logits(model, tokens, sinks, window, int8=True)
    splits = [40], random_split(40, seed=1), [2, 1, 3, 15, 1, 1, 17]
    return max(
        error(feed(model, int8_cache(model, sinks, window), tokens, parts), wanted) for parts in splits
    )


def ragged(sinks=S, window=W):
    rows = Rows(tiny_llama(), int8_cache(tiny_llama(), sinks, window, 3, chunk=8))
    for seed, lengths in enumerate([[9, 2, 0], [1, 1, 1], [5, 14, 3], [1, 1, 1], None, [1, 0, 1], [2, 3, 5]]):
        rows.feed(random_tokens(1 if lengths is None else max(lengths), 3, seed=seed), lengths)
    worst = rows.error()
    rows.restart([1])
    for seed in range(6):
        rows.feed(random_tokens(1, 3, seed=10 + seed))
    return max(worst, rows.error())


SCENARIOS = [one_by_one, in_chunks, ragged]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_any_split_and_any_row_equal_the_definition(scenario, sinks, window):
    assert scenario(sinks, window) <= TOLERANCE


@pytest.mark.parametrize("name", ["gpt_neox", "falcon 40b", "falcon rw", "mpt", "qwen2, three windows"])
def test_every_family_equals_the_definition(name):
    model, tokens = families.tiny_model(name), random_tokens(50)
    wanted = reference_logits(model, tokens, 4, 9, int8=True)
    for parts in (None, random_split(50, seed=1)):
        assert error(feed(model, int8_cache(model, 4, 9), tokens, parts), wanted) <= TOLERANCE


def test_far_away_in_a_text_any_split_equals_token_by_token():
    """A key is rounded in its rotation, so the logits depend on the origin, but not on the split."""
    model, tokens = tiny_llama("yarn"), random_tokens(40)
    wanted = feed(model, int8_cache(model, S, W, origin=10**12), tokens)
    got = feed(model, int8_cache(model, S, W, origin=10**12, chunk=9), tokens, random_split(40, seed=5))
    assert error(got, wanted) <= TOLERANCE
    assert 0 < error(feed(model, int8_cache(model, S, W), tokens), wanted) < 1


def test_a_stream_of_sinks_only_is_not_rounded():
    model, tokens = tiny_llama(), random_tokens(20)
    assert error(feed(model, int8_cache(model, 20, 1), tokens, [1, 1, 6, 12]), model(tokens)) <= TOLERANCE


def test_keys_and_values_are_dequantized_for_one_layer_at_a_time():
    model = tiny_llama(dtype=torch.float32)
    cache = int8_cache(model, 4, 996)
    model(random_tokens(1200), cache)
    layer_bytes = 2 * 2 * 1000 * 8 * 4  # of the keys and values of one of three layers, in float32
    with Allocated() as allocated:
        model(random_tokens(1), cache)
    assert layer_bytes < allocated.peak < 2 * layer_bytes


# Mutations: faults on purpose must break the law


def sinks_are_rounded_too(patch):
    write = int8_ring.Int8Ring._write_sinks

    def rounding(self, move, both):
        numbers, scales = self.encode(*both)
        write(self, move, numbers * scales)

    patch.setattr(int8_ring.Int8Ring, "_write_sinks", rounding)


def a_chunk_sees_itself_exactly(patch):
    append = ring.LayerStore.append

    def exact(self, k, v):
        keys, values = append(self, k, v)
        if self.writes.on_commit is not None:
            keys[:, :, -k.shape[2] :], values[:, :, -k.shape[2] :] = k, v
        return keys, values

    patch.setattr(ring.LayerStore, "append", exact)


def a_chunk_is_rounded_again_when_it_is_stored(patch):
    write = int8_ring.Int8Ring.write

    def rounding(self, move, numbers, scales):
        write(self, move, *self.encode(*(numbers * scales * 0.999)))

    patch.setattr(int8_ring.Int8Ring, "write", rounding)


def one_scale_for_all_heads(patch):
    encode = int8_ring.Int8Ring.encode

    def with_one_scale(self, k, v):
        _, scales = encode(self, k, v)
        scales = scales.amax(2, keepdim=True).expand_as(scales)
        return (torch.stack((k, v)) / scales).round().to(torch.int8), scales

    patch.setattr(int8_ring.Int8Ring, "encode", with_one_scale)


def old_scales_are_not_overwritten(patch):
    write = int8_ring.Int8Ring.write

    def keeping_scales(self, move, numbers, scales):
        before = self.scales.clone()
        write(self, move, numbers, scales)
        self.scales.copy_(before.where(before > 0, self.scales))

    patch.setattr(int8_ring.Int8Ring, "write", keeping_scales)


MUTATIONS = [
    sinks_are_rounded_too,
    a_chunk_sees_itself_exactly,
    a_chunk_is_rounded_again_when_it_is_stored,
    one_scale_for_all_heads,
    old_scales_are_not_overwritten,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_breaks_the_law(mutation, monkeypatch):
    mutation(monkeypatch)
    assert max(scenario() for scenario in SCENARIOS) > 1e-3


# Interruptions, step_back, state_dict, compiled models


@contextmanager
def failing_write(monkeypatch, at):
    """Within this context, writes to tensors of the cache raise KeyboardInterrupt, from number `at` (from 0) on."""
    put, writes = int8_ring.put, 0

    def failing_put(*moved):
        nonlocal writes
        writes += 1
        if writes > at:
            raise KeyboardInterrupt
        put(*moved)

    with monkeypatch.context() as patch:
        patch.setattr(int8_ring, "put", failing_put)
        yield


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 9])
def test_an_interrupted_write_leaves_the_stream_before_or_after_the_chunk(monkeypatch, at, length):
    model, tokens = tiny_llama(), random_tokens(60)
    for sinks, window in [(0, 5), (4, 6), (8, 3)]:
        for before in (0, 3, 30):
            cache = int8_cache(model, sinks, window)
            if before:
                model(tokens[:, :before], cache)
            failed = random_tokens(length, seed=1)
            with failing(model.layers[at % 3]), pytest.raises(Interrupted):
                model(random_tokens(length, seed=3), cache)
            with failing_write(monkeypatch, at), suppress(KeyboardInterrupt):
                model(failed, cache)
            seen = cache.seen.item()
            assert seen in (before, before + length)
            stream = torch.cat((tokens[:, :before], failed[:, : seen - before], random_tokens(20, seed=2)), 1)
            wanted = reference_logits(model, stream, sinks, window, int8=True)[:, seen:]
            assert error(feed(model, cache, stream[:, seen:], [1, 1, 8, 10]), wanted) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_step_back_lets_another_token_follow(sinks, window, length):
    model, tokens = tiny_llama(), random_tokens(60)
    for before in (3, 20):
        cache = int8_cache(model, sinks, window)
        model(tokens[:, :before], cache)
        model(torch.cat((tokens[:, before : before + length - 1], random_tokens(1, seed=8)), 1), cache)
        cache.step_back()
        seen = before + length - 1
        wanted = reference_logits(model, tokens[:, : seen + 15], sinks, window, int8=True)[:, seen:]
        assert error(feed(model, cache, tokens[:, seen : seen + 15], [1, 4, 1, 9]), wanted) <= TOLERANCE


@pytest.mark.parametrize("before", [1, 4, 25])
def test_a_loaded_state_dict_continues_the_stream(before):
    model, tokens = tiny_llama(), random_tokens(40, rows=2)
    cache, other = int8_cache(model, 2, 5, 2), int8_cache(model, 2, 5, 2)
    model(tokens[:, :before], cache)
    model(random_tokens(11, rows=2, seed=1), other)
    state = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
    model(random_tokens(7, rows=2, seed=2), cache)
    other.load_state_dict(state)
    wanted = reference_logits(model, tokens, 2, 5, int8=True)[:, before:]
    assert error(feed(model, other, tokens[:, before:]), wanted) <= TOLERANCE


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS[:-1])
def test_a_compiled_model_equals_the_definition(sinks, window, rows):
    model = streamllm.compile(tiny_llama(), "flat")
    for seed in range(2):  # two caches share the recordings, one of a filling window and one of a full one
        tokens = random_tokens(50, rows, seed)
        got = feed(model, int8_cache(model, sinks, window, rows), tokens, [9, *[1] * 20, 9, *[1] * 12])
        assert error(got, reference_logits(tiny_llama(), tokens, sinks, window, int8=True)) <= TOLERANCE
    recordings = 1 if sinks + window <= 10 else 2
    assert model.recordings == recordings
    got = feed(model, SinkCache(model, sinks, window, rows), tokens)  # not int8, so it is recorded again
    assert error(got, reference_logits(tiny_llama(), tokens, sinks, window)) <= TOLERANCE
    assert model.recordings == recordings + (1 if sinks + window == 1 else 2)


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 0.03), (torch.float16, 0.03), (torch.bfloat16, 0.08)], ids=str
)
def test_errors_of_smaller_dtypes_do_not_grow_along_the_stream(dtype, allowed):
    """The mean error against a stream without rounding does not grow with the length of the stream."""
    model, tokens = tiny_llama("llama3", dtype=dtype), random_tokens(250)
    got = feed(model, int8_cache(model, 4, 40), tokens, [50, *[1] * 50, 120, *[1] * 30]).double()
    difference = (got - reference_logits(model, tokens, 4, 40)).abs()[0].mean(1) / got.std()
    early, late = difference[44:124].mean(), difference[-80:].mean()
    assert early <= allowed
    assert late <= 1.5 * early


@pytest.mark.parametrize(("sinks", "rows"), [(4, 1), (0, 2)])
@pytest.mark.parametrize("name", ["gpt_neox", "falcon 7b", "falcon rw", "mpt", "qwen2, three windows"])
def test_dot_products_with_int8_numbers_equal_the_definition(name, sinks, rows, monkeypatch):
    """The graph that inductor compiles on a CPU, run without compilation."""

    def not_compiled(module, inputs, options):
        return lambda inputs: torch.fx.Interpreter(module).run(*inputs)

    monkeypatch.setattr(library, "library", not_compiled)
    model, tokens = streamllm.compile(families.tiny_model(name), "inductor"), random_tokens(40, rows)
    got = feed(model, int8_cache(model, sinks, 9, rows), tokens, [20, *[1] * 20])
    assert error(got, reference_logits(families.tiny_model(name), tokens, sinks, 9, int8=True)) <= TOLERANCE
    assert model.recordings == 1
