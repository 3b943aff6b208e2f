"""The tiles kernel equals the softmax over all keys, for any tile size, with and without a bias."""

from __future__ import annotations

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.models import attention
from streamllm.models.step import Step
from tests.laws.scenarios import (
    TOLERANCE,
    error,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)


@pytest.mark.parametrize("tile", [1, 3, 16])
@pytest.mark.parametrize("origin", [0, 10**9])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 5), (4, 1), (4, 6), (8, 3), (1, 30), (3, 200)])
def test_logits_equal_the_definition_for_any_tile_size(monkeypatch, sinks, window, origin, tile):
    monkeypatch.setattr(attention, "TILE_QUERIES", tile)
    model, tokens = tiny_llama(), random_tokens(70, rows=2)
    wanted = reference_logits(model, tokens, sinks, window)
    for parts in ([70], [1, 2, 67], [5, 30, 1, 34], random_split(70, seed=2)):
        cache = SinkCache(model, sinks, window, 2, origin=origin)
        assert error(feed(model, cache, tokens, parts), wanted) <= TOLERANCE


@pytest.mark.parametrize("tile", [1, 7, 64])
@pytest.mark.parametrize("window", [1, 6, 25, 100])
def test_tiles_compute_attention_without_a_cache(monkeypatch, window, tile):
    monkeypatch.setattr(attention, "TILE_QUERIES", tile)
    assert_attend_equals_softmax(Step.dense(40, window), bias=False)
    assert_attend_equals_softmax(Step.dense(40, window), bias=True)


@pytest.mark.parametrize("tile", [1, 7, 64])
@pytest.mark.parametrize("seen", [0, 2, 9, 40])
def test_tiles_compute_attention_with_a_bias(monkeypatch, seen, tile):
    monkeypatch.setattr(attention, "TILE_QUERIES", tile)
    model = tiny_llama()
    for sinks, window in [(4, 6), (0, 7), (3, 90)]:
        cache = SinkCache(model, sinks, window)
        if seen:
            model(random_tokens(seen), cache)
        assert_attend_equals_softmax(cache.plan(33).steps[None], bias=True)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_gradients_equal_those_of_the_plain_kernel(monkeypatch, kv_heads):
    """Masks that were cached in inference mode can be used by autograd."""
    tokens = random_tokens(40, rows=2)

    def gradients():
        model = tiny_llama.__wrapped__(kv_heads=kv_heads, windows=(7, 7, 7)).requires_grad_(True)
        model(tokens).square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    monkeypatch.setattr(attention, "TILE_QUERIES", 16)
    with torch.inference_mode():
        attention._run_bias.cache_clear()
        tiny_llama.__wrapped__(windows=(7, 7, 7))(tokens)
    got = gradients()
    monkeypatch.setattr(attention, "flash_attention_cpu", None)
    wanted = gradients()
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def assert_attend_equals_softmax(step: Step, bias: bool) -> None:
    """Compares attend() with the softmax over all keys and the mask of the step."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    T, K, S = step.query_place.shape[1], step.key_place.shape[1], step.sinks
    query, sink_query, keys, values = draw(2, 4, T, 8), draw(2, 4, T, 8), draw(2, 2, K, 8), draw(2, 2, K, 8)
    bias_tensor = draw(1, 4, T, K) if bias else None
    got = attention.attend(query, sink_query if S else None, keys, values, step, 0.3, bias_tensor)
    scores = query @ keys.repeat_interleave(2, 1).transpose(2, 3)
    if S:
        scores[..., :S] = sink_query @ keys[:, :, :S].repeat_interleave(2, 1).transpose(2, 3)
    scores = scores * 0.3 if bias_tensor is None else scores * 0.3 + bias_tensor
    mask = step.mask()
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    assert error(got, scores.softmax(-1) @ values.repeat_interleave(2, 1)) <= TOLERANCE
