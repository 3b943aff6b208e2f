"""The flash kernel of CUDA in attention.py, by a stand-in on the CPU: what it is asked, and the merge of its reads."""

from __future__ import annotations

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.models import attention
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import (
    TOLERANCE,
    error,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)

calls: list[tuple[int, int]] = []


def stand_in(
    query, keys, values, cumulated_q, cumulated_k, queries, length, dropout, causal, debug, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    """Flash attention with a window: the last query stands at the last key. Checks that each query sees a key."""
    assert (dropout, causal, debug, window_size_right) == (0.0, True, False, 0)
    assert query.shape[1] == queries
    assert keys.shape[1] == length
    assert queries <= length
    calls.append((queries, length))
    query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
    place = torch.arange(queries)[:, None] + length - queries
    key = torch.arange(length)
    seen = (key <= place) & (key >= place - window_size_left)
    assert bool(seen.any(1).all())
    scores = (query @ keys.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2), scores.logsumexp(-1), None, None, None


@pytest.fixture(autouse=True)
def flash(monkeypatch) -> None:
    calls.clear()
    monkeypatch.setattr(attention, "flash_attention_cuda", stand_in)
    monkeypatch.setattr(attention, "_flash_cuda_serves", lambda query: True)


@pytest.mark.parametrize(("sinks", "window"), [(4, 9), (0, 5), (1, 1), (8, 30), (8, 3)])
@pytest.mark.parametrize("origin", [0, 10**9])
def test_any_split_equals_the_definition(sinks, window, origin) -> None:
    model, tokens = tiny_llama(), random_tokens(60)
    wanted = reference_logits(model, tokens, sinks, window)
    for parts in ([60], [3, 57], [20, 1, 39], random_split(60, seed=1), random_split(60, seed=2, longest=40)):
        got = feed(model, SinkCache(model, sinks, window, origin=origin), tokens, parts)
        assert error(got, wanted) <= TOLERANCE
    assert calls


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_the_definition(name) -> None:
    model, tokens = tiny_model(name), random_tokens(50)
    got = feed(model, SinkCache(model, 3, 9), tokens, [20, 30])
    assert error(got, reference_logits(model, tokens, 3, 9)) <= TOLERANCE


def test_one_call_reads_a_chunk() -> None:
    model, tokens = tiny_llama(layers=1), random_tokens(60)
    feed(model, SinkCache(model, 4, 20), tokens, [30, 30])
    assert calls == [(26, 26), (30, 49)]  # the sinks of the text read themselves


def test_a_window_without_a_cache_is_one_call() -> None:
    model, tokens = tiny_model("mistral"), random_tokens(40)
    wanted = model(tokens)
    assert calls == [(40, 40)] * 3
    calls.clear()
    assert error(feed(model, SinkCache(model, 0, 40), tokens), wanted) <= TOLERANCE
