"""SinkCache as its user meets it: what it refuses and says, copies, and windows of the model's own."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.models import llama
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

rounded_or_not = pytest.mark.parametrize("quantize", [None, "int8"])


@pytest.mark.parametrize(
    ("given", "says"),
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
def test_a_cache_that_cannot_be_is_refused_in_one_sentence(given, says):
    with pytest.raises(ValueError, match=says) as caught:
        SinkCache(tiny_llama(), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows", [[3], [-1], [0, 3], 1, [True, False, False], torch.tensor([True, False, True]), [0.5], "0", [[0]]]
)
def test_rows_that_are_none_are_refused_and_nothing_is_reset(rows):
    cache = SinkCache(tiny_llama(), 2, 4, batch_size=3)
    tiny_llama()(random_tokens(5, 3), cache)
    with pytest.raises(ValueError, match="rows must be a list of row numbers in 0 … 2, not"):
        cache.reset(rows)
    assert cache.seen.tolist() == [5, 5, 5]


@pytest.mark.parametrize("rows", [[1], (1,), {1}, range(1, 2), torch.tensor([1]), torch.tensor([1]).numpy()])
def test_rows_are_reset_alone(rows):
    cache = SinkCache(tiny_llama(), 2, 4, batch_size=3)
    tiny_llama()(random_tokens(5, 3), cache)
    cache.reset(rows)
    assert cache.seen.tolist() == [5, 0, 5]
    cache.reset([])
    assert cache.seen.tolist() == [5, 0, 5]
    cache.reset()
    assert cache.seen.tolist() == [0, 0, 0]


def test_the_window_by_default_is_what_the_model_was_trained_for_and_at_most_1020():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SinkCache(tiny_llama(trained_length=4096)).window == 1020
        assert SinkCache(tiny_llama(trained_length=100)).window == 96
        assert SinkCache(tiny_llama(trained_length=100), sinks=99).window == 1
        assert SinkCache(tiny_llama(trained_length=100), sinks=4, window=96).window == 96
    with pytest.raises(
        ValueError, match="100 sinks leave no room for a window: the model was trained for 100"
    ):
        SinkCache(tiny_llama(trained_length=100), sinks=100)


def test_more_than_the_model_was_trained_for_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match=r"sinks \+ window = 101 is longer than the 100 tokens .* window=96"):
        SinkCache(tiny_llama(trained_length=100), sinks=4, window=97)


def test_a_cache_says_what_it_is():
    cache = SinkCache(tiny_llama(), sinks=4, window=1020, batch_size=2, chunk=64)
    bytes_held = 3 * 2 * 2 * 2 * 1024 * 8 * 8  # layers, keys and values, B, G, slots, D, bytes
    assert cache.nbytes == bytes_held == 1572864
    assert repr(cache) == (
        "SinkCache(sinks=4, window=1020, batch_size=2, chunk=64, seen=0, 1.6 MB of torch.float64 on cpu)"
    )
    tiny_llama()(random_tokens(5, 2), cache, lengths=[5, 3])
    assert "seen=[5, 3]" in repr(cache)
    assert cache.nbytes == bytes_held


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_cache_in_int8_holds_a_byte_for_a_number_and_a_scale_for_a_vector(dtype):
    cache = SinkCache(tiny_llama(dtype=dtype), sinks=4, window=1020, batch_size=2, quantize="int8")
    vectors = 3 * 2 * 2 * 2  # layers, keys and values, B, G
    bytes_held = vectors * (4 * 8 * dtype.itemsize + 1020 * (8 + dtype.itemsize))
    assert cache.nbytes == bytes_held == sum(tensor.nbytes for tensor in held(cache))
    assert f"seen=0, {bytes_held / 1e6:.1f} MB of int8 on cpu" in repr(cache)
    tiny_llama(dtype=dtype)(random_tokens(2000, 2), cache)
    assert cache.nbytes == bytes_held
    assert {tensor.dtype for tensor in held(cache)} == {dtype, torch.int8}


def held(cache):
    return [tensor for name, tensor in cache.state_dict().items() if name.startswith("layers")]


def test_seen_is_a_count_that_nobody_can_write_to():
    cache = SinkCache(tiny_llama(), 2, 4, batch_size=2)
    tiny_llama()(random_tokens(5, 2), cache)
    seen = cache.seen
    assert seen.dtype == torch.int64
    seen += 1
    assert cache.seen.tolist() == [5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_has_the_models_type(dtype):
    cache = SinkCache(tiny_llama(dtype=dtype), 2, 4)
    assert cache.dtype == dtype
    assert tiny_llama(dtype=dtype)(random_tokens(20), cache).dtype == dtype


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("before", [0, 3, 20])
@rounded_or_not
def test_a_copy_goes_its_own_way(twin, before, quantize):
    model, tokens, other = tiny_llama(), random_tokens(30), random_tokens(30, seed=1)
    cache = SinkCache(model, 2, 5, quantize=quantize)
    if before:
        model(tokens[:, :before], cache)
    with failing(model.layers[1]), pytest.raises(Interrupted):  # a copy of an interrupted one is no worse
        model(other[:, :9], cache)
    copied = twin(cache)
    other[:, :before] = tokens[:, :before]
    for stream, given in [(copied, other), (cache, tokens)]:
        got = feed(model, stream, given[:, before:], random_split(30 - before, seed=1))
        assert error(got, reference_logits(model, given, 2, 5, quantize == "int8")[:, before:]) <= TOLERANCE


def test_a_copy_is_no_larger_than_what_is_held():
    cache = SinkCache(tiny_llama(), 2, 500)
    assert len(pickle.dumps(cache)) < 1.05 * cache.nbytes + 10_000


@rounded_or_not
def test_a_cache_made_in_inference_mode_works_outside_of_it_and_the_other_way_round(quantize):
    model, tokens = tiny_llama(), random_tokens(30)
    with torch.inference_mode():
        inside = SinkCache(model, 2, 5, quantize=quantize)
        model(tokens[:, :7], inside)
    outside = SinkCache(model, 2, 5, quantize=quantize)
    model(tokens[:, :7], outside)
    with torch.inference_mode():
        first = feed(model, outside, tokens[:, 7:], [1, 10, 12])
        inside.reset()
    second = feed(model, inside, tokens, [7, 1, 10, 12])[:, 7:]
    assert torch.equal(first, second)
    outside.reset()


@rounded_or_not
def test_what_was_not_a_number_in_one_row_stays_there_and_leaves_with_it(quantize):
    """A row of NaN, reset, leaves nothing behind: neither what is masked nor what is multiplied by zero."""
    model = type(tiny_llama())(tiny_llama().config).double()
    model.load_state_dict(tiny_llama().state_dict())
    model.requires_grad_(False)
    tokens = random_tokens(30, 2) % 60  # token 60 stands for what overflows
    model.embed.weight[60] = torch.nan
    cache = SinkCache(model, 2, 5, batch_size=2, quantize=quantize)
    poisoned = tokens[:, :9].clone()
    poisoned[1] = 60
    out = [model(poisoned, cache)]
    cache.reset([1])
    out += [model(tokens[:, 9:10], cache), model(tokens[:, 10:16], cache, lengths=[3, 6])]
    assert out[0][1].isnan().all()
    whole = reference_logits(tiny_llama(), tokens, 2, 5, quantize == "int8")
    assert error(torch.cat((out[0][0], out[1][0], out[2][0, :3])), whole[0, :13]) <= TOLERANCE
    alone = reference_logits(tiny_llama(), tokens[1:, 9:16], 2, 5, quantize == "int8")[0]
    assert error(torch.cat((out[1][1], out[2][1])), alone) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 9])
@rounded_or_not
def test_a_model_of_another_type_is_refused_in_one_sentence_and_does_no_harm(length, quantize):
    model, tokens = tiny_llama(), random_tokens(30)
    cache = SinkCache(model, 2, 4, quantize=quantize)
    model(tokens[:, :9], cache)
    with pytest.raises(ValueError, match=r"made for torch\.float64, the model computes in torch\.float32"):
        tiny_llama(dtype=torch.float32)(random_tokens(length), cache)
    wanted = reference_logits(model, tokens, 2, 4, quantize == "int8")
    assert error(model(tokens[:, 9:], cache), wanted[:, 9:]) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize(
    "other", [{"kv_heads": 4}, {"kv_heads": 1}, {"head_dim": 12}, {"layers": 1}, {"layers": 5}], ids=str
)
@rounded_or_not
def test_a_model_of_another_shape_does_no_harm(other, length, quantize):
    model, tokens = tiny_llama(), random_tokens(30)
    cache = SinkCache(model, 2, 4, quantize=quantize)
    model(tokens[:, :9], cache)
    with pytest.raises((ValueError, RuntimeError)):
        tiny_llama(**other)(random_tokens(length), cache)
    wanted = reference_logits(model, tokens, 2, 4, quantize == "int8")
    assert error(model(tokens[:, 9:], cache), wanted[:, 9:]) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 9])
def test_autocast_is_refused_in_one_sentence(length):
    model = tiny_llama(dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"computes in torch\.bfloat16.* leave autocast off"),
    ):
        model(random_tokens(length), SinkCache(model, 2, 4))


@pytest.mark.parametrize("given", [{"sinks": 3, "window": 5}, {"sinks": 1, "window": 7}, {"origin": 9}])
def test_a_state_of_other_sizes_is_refused_though_its_tensors_fit(given):
    cache = SinkCache(tiny_llama(), **({"sinks": 2, "window": 6} | given))
    tiny_llama()(random_tokens(20), cache)
    other = SinkCache(tiny_llama(), sinks=2, window=6)
    tiny_llama()(random_tokens(9), other)
    with pytest.raises(ValueError, match=r"other sinks, window and origin: \[.*\], here \[2, 6, 0\]"):
        other.load_state_dict(cache.state_dict())
    assert other.seen.tolist() == [9]


def test_a_state_of_another_model_is_refused_by_name():
    other = SinkCache(tiny_llama(), 2, 6)
    with pytest.raises(ValueError, match="other layers"):
        other.load_state_dict(SinkCache(tiny_llama(layers=1), 2, 6).state_dict())
    with pytest.raises(ValueError, match=r"layers\.0\.keys is torch\.float32"):
        other.load_state_dict(SinkCache(tiny_llama(dtype=torch.float32), 2, 6).state_dict())


@pytest.mark.parametrize("quantize", ["int8", None])
def test_a_state_is_not_rounded_and_not_made_exact_again(quantize):
    cache, other = SinkCache(tiny_llama(), 2, 6, quantize=quantize), SinkCache(tiny_llama(), 2, 6)
    if quantize is None:
        other = SinkCache(tiny_llama(), 2, 6, quantize="int8")
    tiny_llama()(random_tokens(9), other)
    says = f"quantize={quantize!r}, here it is {other.quantize!r}"
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(cache.state_dict())
    assert other.seen.tolist() == [9]


# A model whose layers have windows of their own


class Layered(llama.Model):
    """Llama with sliding windows, to show that a cache keeps one plan for each distinct window."""

    windows = (None, 3, 8)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.geometry = replace(self.geometry, windows=self.windows)

    def hidden(self, tokens, plan):
        x = self.embed(tokens)
        for layer, memory, window in zip(self.layers, plan.stores, self.windows, strict=True):
            step = plan.steps[window]
            x = layer(x, step, llama.rotation(self.config.rope, step, x.dtype), memory)
        return self.norm(x)


@pytest.fixture(scope="module")
def layered():
    model = Layered(tiny_llama().config).double()
    model.load_state_dict(tiny_llama().state_dict())
    network = reference.Llama(model)
    network.windows = list(Layered.windows)
    return model.requires_grad_(False), network


@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (2, 2), (2, 5), (4, 20), (0, 100)])
def test_each_layer_keeps_its_own_window(layered, sinks, window):
    model, network = layered
    tokens = random_tokens(40)
    wanted = reference.run(network, tokens[0].tolist(), sinks, window)[None]
    for parts in (None, random_split(40, seed=2), [40]):
        cache = SinkCache(model, sinks, window, origin=len(parts or []) * 10**9, chunk=13)
        assert error(feed(model, cache, tokens, parts), wanted) <= TOLERANCE
    slots = [sinks + min(window, own or window) for own in Layered.windows]
    assert cache.nbytes == sum(2 * 2 * slot * 8 * 8 for slot in slots)


def test_without_sinks_a_layer_window_is_the_band_of_the_dense_forward(layered):
    model, network = layered
    tokens = random_tokens(40)
    dense = model(tokens)
    assert error(dense, reference.run(network, tokens[0].tolist(), 0, 100)[None]) <= TOLERANCE
    assert error(feed(model, SinkCache(model, 0, 100), tokens, random_split(40, seed=3)), dense) <= TOLERANCE


def test_an_interruption_leaves_every_layer_whatever_its_window(layered):
    model, network = layered
    tokens = random_tokens(40)
    cache = SinkCache(model, 2, 6)
    model(tokens[:, :15], cache)
    for length in (1, 12):
        with failing(model.layers[2]), pytest.raises(Interrupted):
            model(random_tokens(length, seed=4), cache)
    wanted = reference.run(network, tokens[0].tolist(), 2, 6)[None]
    assert error(feed(model, cache, tokens[:, 15:], [1, 4, 20]), wanted[:, 15:]) <= TOLERANCE
