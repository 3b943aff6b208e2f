"""SinkCache: arguments, resets, copies, other models, state_dict, and models with sliding windows."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.models import llama
from streamllm.status import resident_bytes
from tests.laws import reference
from tests.laws.scenarios import (
    TOLERANCE,
    Interrupted,
    error,
    failing,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)

quantized_or_not = pytest.mark.parametrize("quantize", [None, "int8"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sinks": -1}, "sinks must be a whole number of at least 0, not -1"),
        ({"sinks": True}, "sinks must be a whole number of at least 0, not True"),
        ({"sinks": 1.5}, "sinks must be a whole number of at least 0, not 1.5"),
        ({"window": 0}, "window must be a whole number of at least 1, not 0"),
        ({"window": "8"}, "window must be a whole number of at least 1, not '8'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1, not 0"),
        ({"origin": -1}, "origin must be a whole number of at least 0, not -1"),
        ({"origin": 2**48}, "origin must be below 281474976710656"),
        ({"quantize": "int4"}, "quantize must be None or \"int8\", not 'int4'"),
        ({"quantize": True}, 'quantize must be None or "int8", not True'),
        ({"quantize": ["int8"]}, 'quantize must be None or "int8", not'),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        SinkCache(tiny_llama(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows", [[3], [-1], [0, 3], 1, [True, False, False], torch.tensor([True, False, True]), [0.5], "0", [[0]]]
)
def test_wrong_rows_are_refused_and_nothing_is_reset(rows):
    cache = SinkCache(tiny_llama(), 2, 4, batch_size=3)
    tiny_llama()(random_tokens(5, 3), cache)
    with pytest.raises(ValueError, match="rows must be a list of row numbers in 0 … 2, not"):
        cache.reset(rows)
    assert cache.seen.tolist() == [5, 5, 5]


@pytest.mark.parametrize("rows", [[1], (1,), {1}, range(1, 2), torch.tensor([1]), torch.tensor([1]).numpy()])
def test_only_the_given_rows_are_reset(rows):
    cache = SinkCache(tiny_llama(), 2, 4, batch_size=3)
    tiny_llama()(random_tokens(5, 3), cache)
    cache.reset(rows)
    assert cache.seen.tolist() == [5, 0, 5]
    cache.reset([])
    assert cache.seen.tolist() == [5, 0, 5]
    cache.reset()
    assert cache.seen.tolist() == [0, 0, 0]


def test_the_default_window_fits_the_trained_length_and_is_at_most_4092():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SinkCache(tiny_llama(trained_length=8192)).window == 4092
        assert SinkCache(tiny_llama(trained_length=100)).window == 96
        assert SinkCache(tiny_llama(trained_length=100), sinks=99).window == 1
        assert SinkCache(tiny_llama(trained_length=100), sinks=4, window=96).window == 96
    with pytest.raises(
        ValueError, match="100 sinks leave no room for a window: the model was trained for 100"
    ):
        SinkCache(tiny_llama(trained_length=100), sinks=100)


def test_a_cache_longer_than_the_trained_length_causes_a_warning():
    with pytest.warns(UserWarning, match=r"sinks \+ window = 101 is longer than the 100 tokens .* window=96"):
        SinkCache(tiny_llama(trained_length=100), sinks=4, window=97)


def test_repr_and_nbytes_describe_the_cache():
    cache = SinkCache(tiny_llama(), sinks=4, window=1020, batch_size=2, chunk=64)
    nbytes = 3 * 2 * 2 * 2 * 1024 * 8 * 8  # layers, keys and values, B, G, slots, D, bytes
    assert cache.nbytes == nbytes == 1572864
    assert repr(cache) == (
        "SinkCache(sinks=4, window=1020, batch_size=2, chunk=64, seen=0, 1.6 MB of torch.float64 on cpu)"
    )
    tiny_llama()(random_tokens(5, 2), cache, lengths=[5, 3])
    assert "seen=[5, 3]" in repr(cache)
    assert cache.nbytes == nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_int8_cache_holds_one_byte_per_number_and_one_scale_per_vector(dtype):
    cache = SinkCache(tiny_llama(dtype=dtype), sinks=4, window=1020, batch_size=2, quantize="int8")
    vectors = 3 * 2 * 2 * 2  # layers, keys and values, B, G
    nbytes = vectors * (4 * 8 * dtype.itemsize + 1020 * (8 + dtype.itemsize))
    assert cache.nbytes == nbytes == sum(tensor.nbytes for tensor in layer_tensors(cache))
    assert f"seen=0, {nbytes / 1e6:.1f} MB of int8 on cpu" in repr(cache)
    tiny_llama(dtype=dtype)(random_tokens(2000, 2), cache)
    assert cache.nbytes == nbytes
    assert {tensor.dtype for tensor in layer_tensors(cache)} == {dtype, torch.int8}


def layer_tensors(cache):
    return cache.tensors()


def test_changing_the_returned_seen_does_not_change_the_cache():
    cache = SinkCache(tiny_llama(), 2, 4, batch_size=2)
    tiny_llama()(random_tokens(5, 2), cache)
    seen = cache.seen
    assert seen.dtype == torch.int64
    seen += 1
    assert cache.seen.tolist() == [5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_has_the_dtype_of_the_model(dtype):
    cache = SinkCache(tiny_llama(dtype=dtype), 2, 4)
    assert cache.dtype == dtype
    assert tiny_llama(dtype=dtype)(random_tokens(20), cache).dtype == dtype


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("before", [0, 3, 20])
@quantized_or_not
def test_a_copy_is_a_stream_of_its_own(copied, before, quantize):
    model, tokens, other = tiny_llama(), random_tokens(30), random_tokens(30, seed=1)
    cache = SinkCache(model, 2, 5, quantize=quantize)
    if before:
        model(tokens[:, :before], cache)
    with failing(model.layers[1]), pytest.raises(Interrupted):  # also the copy of an interrupted stream
        model(other[:, :9], cache)
    copy_of_cache = copied(cache)
    other[:, :before] = tokens[:, :before]
    for stream, fed in [(copy_of_cache, other), (cache, tokens)]:
        got = feed(model, stream, fed[:, before:], random_split(30 - before, seed=1))
        assert error(got, reference_logits(model, fed, 2, 5, quantize == "int8")[:, before:]) <= TOLERANCE


def test_a_pickle_is_no_larger_than_the_cache():
    cache = SinkCache(tiny_llama(), 2, 500)
    assert len(pickle.dumps(cache)) < 1.05 * cache.nbytes + 10_000


@quantized_or_not
def test_a_cache_works_inside_and_outside_of_inference_mode(quantize):
    model, tokens = tiny_llama(), random_tokens(30)
    with torch.inference_mode():
        made_inside = SinkCache(model, 2, 5, quantize=quantize)
        model(tokens[:, :7], made_inside)
    made_outside = SinkCache(model, 2, 5, quantize=quantize)
    model(tokens[:, :7], made_outside)
    with torch.inference_mode():
        first = feed(model, made_outside, tokens[:, 7:], [1, 10, 12])
        made_inside.reset()
    second = feed(model, made_inside, tokens, [7, 1, 10, 12])[:, 7:]
    assert torch.equal(first, second)
    made_outside.reset()


@quantized_or_not
def test_nan_in_one_row_stays_in_that_row_and_is_gone_after_its_reset(quantize):
    """Old NaN values must not reach the new stream through masked scores or through products with zero."""
    model = type(tiny_llama())(tiny_llama().config).double()
    model.load_state_dict(tiny_llama().state_dict())
    model.requires_grad_(False)
    tokens = random_tokens(30, 2) % 60  # token 60 is the one whose embedding is NaN
    model.embed.weight[60] = torch.nan
    cache = SinkCache(model, 2, 5, batch_size=2, quantize=quantize)
    with_nan = tokens[:, :9].clone()
    with_nan[1] = 60
    out = [model(with_nan, cache)]
    cache.reset([1])
    out += [model(tokens[:, 9:10], cache), model(tokens[:, 10:16], cache, lengths=[3, 6])]
    assert out[0][1].isnan().all()
    whole = reference_logits(tiny_llama(), tokens, 2, 5, quantize == "int8")
    assert error(torch.cat((out[0][0], out[1][0], out[2][0, :3])), whole[0, :13]) <= TOLERANCE
    alone = reference_logits(tiny_llama(), tokens[1:, 9:16], 2, 5, quantize == "int8")[0]
    assert error(torch.cat((out[1][1], out[2][1])), alone) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 9])
@quantized_or_not
def test_a_model_of_another_dtype_is_refused_and_does_not_change_the_stream(length, quantize):
    model, tokens = tiny_llama(), random_tokens(30)
    cache = SinkCache(model, 2, 4, quantize=quantize)
    model(tokens[:, :9], cache)
    with pytest.raises(ValueError, match=r"made for torch\.float64, and the model.s keys are torch\.float32"):
        tiny_llama(dtype=torch.float32)(random_tokens(length), cache)
    wanted = reference_logits(model, tokens, 2, 4, quantize == "int8")
    assert error(model(tokens[:, 9:], cache), wanted[:, 9:]) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize(
    "other", [{"kv_heads": 4}, {"kv_heads": 1}, {"head_dim": 12}, {"layers": 1}, {"layers": 5}], ids=str
)
@quantized_or_not
def test_a_model_of_another_shape_does_not_change_the_stream(other, length, quantize):
    model, tokens = tiny_llama(), random_tokens(30)
    cache = SinkCache(model, 2, 4, quantize=quantize)
    model(tokens[:, :9], cache)
    with pytest.raises((ValueError, RuntimeError)):
        tiny_llama(**other)(random_tokens(length), cache)
    wanted = reference_logits(model, tokens, 2, 4, quantize == "int8")
    assert error(model(tokens[:, 9:], cache), wanted[:, 9:]) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 9])
def test_autocast_is_refused(length):
    model = tiny_llama(dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"autocast is on.* leave autocast off"),
    ):
        model(random_tokens(length), SinkCache(model, 2, 4))


@pytest.mark.parametrize("changes", [{"sinks": 3, "window": 5}, {"sinks": 1, "window": 7}, {"origin": 9}])
def test_a_state_dict_of_other_sizes_is_refused_although_its_tensors_fit(changes):
    cache = SinkCache(tiny_llama(), **({"sinks": 2, "window": 6} | changes))
    tiny_llama()(random_tokens(20), cache)
    other = SinkCache(tiny_llama(), sinks=2, window=6)
    tiny_llama()(random_tokens(9), other)
    with pytest.raises(ValueError, match=r"other sinks, window and origin: \[.*\], here \[2, 6, 0\]"):
        other.load_state_dict(cache.state_dict())
    assert other.seen.tolist() == [9]


def test_a_state_dict_of_another_model_is_refused():
    other = SinkCache(tiny_llama(), 2, 6)
    with pytest.raises(ValueError, match="other layers"):
        other.load_state_dict(SinkCache(tiny_llama(layers=1), 2, 6).state_dict())
    with pytest.raises(ValueError, match=r"layers\.0\.keys is torch\.float32"):
        other.load_state_dict(SinkCache(tiny_llama(dtype=torch.float32), 2, 6).state_dict())


@pytest.mark.parametrize("quantize", ["int8", None])
def test_a_state_dict_with_another_quantization_is_refused(quantize):
    cache, other = SinkCache(tiny_llama(), 2, 6, quantize=quantize), SinkCache(tiny_llama(), 2, 6)
    if quantize is None:
        other = SinkCache(tiny_llama(), 2, 6, quantize="int8")
    tiny_llama()(random_tokens(9), other)
    message = f"quantize={quantize!r}, here it is {other.quantize!r}"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(cache.state_dict())
    assert other.seen.tolist() == [9]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda cache: cache.evict_range(1, 4),
            r"the range 1 … 4 touches the sinks, which stay: .* at least 2",
        ),
        (lambda cache: cache.evict_range(0, 2), "touches the sinks"),
        (lambda cache: cache.evict_range(5, 4), "stop must not be below start, and the range is 5 … 4"),
        (lambda cache: cache.evict_range(3, 7), "row 1 holds 5 entries: stop must be at most 5, not 7"),
        (lambda cache: cache.evict_range(3, 9, rows=[0]), "row 0 holds 8 entries"),
        (lambda cache: cache.evict_range(-3, -1), "start must be a whole number of at least 0, not -3"),
        (lambda cache: cache.evict_range(2.0, 4), "start must be a whole number of at least 0, not 2.0"),
        (lambda cache: cache.evict_range(2, "4"), "stop must be a whole number of at least 0, not '4'"),
        (lambda cache: cache.evict_range(2, None), "stop must be a whole number of at least 0, not None"),
        (lambda cache: cache.evict_range(2, 3, rows=[2]), "rows must be a list of row numbers in 0 … 1"),
        (lambda cache: cache.evict_range(2, 3, rows=0), "rows must be a list of row numbers in 0 … 1"),
        (lambda cache: cache.evict_for_space(7), "n must be at most 6, the longest window of a layer, not 7"),
        (lambda cache: cache.evict_for_space(-1), "n must be a whole number of at least 0, not -1"),
        (lambda cache: cache.evict_for_space(True), "n must be a whole number of at least 0, not True"),
        (lambda cache: cache.evict_for_space(1, rows=[-1]), "rows must be a list of row numbers"),
        (lambda cache: cache.rewind(2), r"row 0 can go back by at most 1 tokens, not 2: .*evict_range"),
        (lambda cache: cache.rewind(6, rows=[1]), "row 1 can go back by at most 5 tokens, not 6"),
        (lambda cache: cache.rewind(1.5), "n must be a whole number of at least 0, not 1.5"),
    ],
)
def test_a_wrong_eviction_is_refused_in_one_line_and_changes_nothing(call, message):
    cache = SinkCache(tiny_llama(), 2, 6, batch_size=2)
    tiny_llama()(random_tokens(20, 2), cache, lengths=[20, 5])
    before = cache.snapshot()
    with pytest.raises(ValueError, match=message) as caught:
        call(cache)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in cache.state_dict().items())


def test_held_counts_entries_and_seen_counts_tokens():
    cache = SinkCache(tiny_llama(), 2, 6, batch_size=2)
    assert cache.held.dtype == torch.int64
    assert cache.held.tolist() == [0, 0]
    tiny_llama()(random_tokens(20, 2), cache, lengths=[20, 5])
    assert cache.held.tolist() == [8, 5]
    cache.evict_range(3, 5)
    assert (cache.held.tolist(), cache.seen.tolist()) == ([6, 3], [20, 5])
    cache.evict_range(4, 6, rows=[0])  # the newest ones: `seen` stays
    assert (cache.held.tolist(), cache.seen.tolist()) == ([4, 3], [20, 5])
    cache.evict_range(3, 3)
    cache.evict_for_space(0)
    cache.evict_for_space(3)
    assert (cache.held.tolist(), cache.seen.tolist()) == ([4, 3], [20, 5])
    cache.evict_for_space(5)
    assert (cache.held.tolist(), cache.seen.tolist()) == ([3, 3], [20, 5])
    tiny_llama()(random_tokens(4, 2), cache)
    assert (cache.held.tolist(), cache.seen.tolist()) == ([7, 7], [24, 9])
    cache.reset([1])
    assert (cache.held.tolist(), cache.seen.tolist()) == ([7, 0], [24, 0])


@pytest.mark.parametrize("before", [0, 5, 40])
def test_a_state_without_a_version_is_loaded(before):
    """As it was saved before entries could be taken out: with all slots."""
    model, tokens = tiny_llama(), random_tokens(before + 30)
    cache, other = SinkCache(model, 2, 6), SinkCache(model, 2, 6)
    if before:
        model(tokens[:, :before], cache)
    state = {name: tensor for name, tensor in cache.state_dict().items() if name not in ("version", "rows")}
    state |= cache._stored()
    model(random_tokens(20), other)
    other.evict_range(3, 5)
    other.load_state_dict(state)
    assert other.seen.tolist() == [before]
    wanted = reference_logits(model, tokens, 2, 6)[:, before:]
    assert error(feed(model, other, tokens[:, before:], [1, 4, 1, 24]), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": torch.tensor([2])},
            r"the state has version \[2\], and this version of streamllm reads \[1\]",
        ),
        (
            {"rows": torch.tensor([[0, 0, 0, 41]])},
            "the state is damaged: row 0 has seen 40 tokens and has Row",
        ),
        ({"rows": torch.tensor([[0, 0, 0, 1]])}, "the state is damaged"),
        ({"rows": torch.tensor([[41, 0, 0, 2]])}, "the state is damaged"),
        ({"rows": torch.tensor([[-1, 0, 0, 2]])}, "the state is damaged"),
        ({"rows": torch.tensor([[0, 60, 0, 2]])}, "the state is damaged"),
        ({"rows": torch.tensor([[0, 0, 41, 2]])}, "the state is damaged"),
        (
            {"rows": torch.tensor([[0, 0, 0, 2, 2]])},
            r"rows is torch.int64 \[1, 5\], here torch.int64 \[1, 4\]",
        ),
    ],
)
def test_a_state_of_another_version_or_with_impossible_numbers_is_refused(changes, message):
    cache, other = SinkCache(tiny_llama(), 2, 6), SinkCache(tiny_llama(), 2, 6)
    tiny_llama()(random_tokens(40), cache)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(cache.state_dict() | changes)
    assert other.seen.tolist() == [0]


@quantized_or_not
def test_a_short_stream_has_a_short_state(quantize):
    """It holds the used slots alone, and loads into a cache that was used before, whatever that one holds."""
    model, tokens = tiny_llama(), random_tokens(40)
    cache, other = (SinkCache(model, 2, 30, quantize=quantize) for _ in range(2))
    model(tokens[:, :10], cache)
    state = cache.snapshot()
    slots = {name.rpartition(".")[2]: tensor.shape[-2] for name, tensor in state.items() if "layers" in name}
    assert slots == (
        {"keys": 10, "values": 10} if quantize is None else {"sinks": 2, "scales": 8, "numbers": 8}
    )
    model(random_tokens(40, seed=1), other)
    for tensor in other.tensors():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    other.load_state_dict(state)
    wanted = reference_logits(model, tokens, 2, 30, quantize == "int8")[:, 10:]
    for stream in (other, cache.copy(), cache):
        assert error(feed(model, stream, tokens[:, 10:], [1, 4, 1, 24]), wanted) <= TOLERANCE


def test_a_state_with_fewer_slots_than_its_streams_have_used_is_refused():
    model = tiny_llama()
    cache, other = SinkCache(model, 2, 30), SinkCache(model, 2, 30)
    model(random_tokens(10), cache)
    state = cache.snapshot()
    state["layers.1.values"] = state["layers.1.values"][:, :, :9]
    with pytest.raises(ValueError, match=r"damaged: layers.1.values has 9 slots, and its streams used 10"):
        other.load_state_dict(state)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell resident memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_stream_takes_little_memory_of_a_long_window(dtype):
    model = tiny_llama(dtype=dtype)
    model(random_tokens(60), SinkCache(model, 2, 60))
    before = resident_bytes()
    cache = SinkCache(model, 4, 900_000)
    model(random_tokens(60), cache)
    model(random_tokens(1), cache)
    copied = cache.copy()
    assert cache.nbytes == copied.nbytes > 150e6
    assert resident_bytes() - before < 20e6


def test_a_cache_that_cannot_fit_is_refused():
    with pytest.warns(UserWarning, match="longer than"), pytest.raises(MemoryError) as caught:
        SinkCache(tiny_llama(), window=10**12, batch_size=3)
    wanted = "not enough memory for caches of 3 streams with 4 sinks and a window of 1,000,000,000,000: when it is full"
    assert wanted in str(caught.value)
    assert 'on cpu; give a smaller window, fewer streams or quantize="int8"' in str(caught.value)


# A model whose layers have different sliding windows


class LlamaWithWindows(llama.Model):
    """Llama with a sliding window in two of its layers."""

    windows = (None, 3, 8)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.geometry = replace(self.geometry, windows=self.windows)

    def hidden(self, tokens, plan):
        x = self.embed(tokens)
        for layer, store, window in zip(self.layers, plan.stores, self.windows, strict=True):
            step = plan.steps[window]
            x = layer(x, step, llama.rotation(self.config.rope, step, x.dtype), store)
        return self.norm(x)


@pytest.fixture(scope="module")
def model_and_reference():
    model = LlamaWithWindows(tiny_llama().config).double()
    model.load_state_dict(tiny_llama().state_dict())
    network = reference.Llama(model)
    network.windows = list(LlamaWithWindows.windows)
    return model.requires_grad_(False), network


@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (2, 2), (2, 5), (4, 20), (0, 100)])
def test_each_layer_keeps_its_own_window(model_and_reference, sinks, window):
    model, network = model_and_reference
    tokens = random_tokens(40)
    wanted = reference.run(network, tokens[0].tolist(), sinks, window)[None]
    for parts in (None, random_split(40, seed=2), [40]):
        cache = SinkCache(model, sinks, window, origin=len(parts or []) * 10**9, chunk=13)
        assert error(feed(model, cache, tokens, parts), wanted) <= TOLERANCE
    slots = [sinks + min(window, sliding or window) for sliding in LlamaWithWindows.windows]
    assert cache.nbytes == sum(2 * 2 * slot * 8 * 8 for slot in slots)


def test_without_sinks_windows_of_layers_equal_those_of_the_dense_forward(model_and_reference):
    model, network = model_and_reference
    tokens = random_tokens(40)
    dense = model(tokens)
    assert error(dense, reference.run(network, tokens[0].tolist(), 0, 100)[None]) <= TOLERANCE
    assert error(feed(model, SinkCache(model, 0, 100), tokens, random_split(40, seed=3)), dense) <= TOLERANCE


def test_an_interruption_does_not_change_any_layer(model_and_reference):
    model, network = model_and_reference
    tokens = random_tokens(40)
    cache = SinkCache(model, 2, 6)
    model(tokens[:, :15], cache)
    for length in (1, 12):
        with failing(model.layers[2]), pytest.raises(Interrupted):
            model(random_tokens(length, seed=4), cache)
    wanted = reference.run(network, tokens[0].tolist(), 2, 6)[None]
    assert error(feed(model, cache, tokens[:, 15:], [1, 4, 20]), wanted[:, 15:]) <= TOLERANCE
