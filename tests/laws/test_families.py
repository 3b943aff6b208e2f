"""The law of streaming for every family and both position encodings, in float64 against the definition.

The law allows 1e-9 standard deviations of the logits.
"""

from __future__ import annotations

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.models.alibi import Alibi
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import (
    TOLERANCE,
    Rows,
    error,
    feed,
    random_split,
    random_tokens,
    reference_logits,
)

SINKS_AND_WINDOWS = [(4, 9), (0, 5), (1, 1), (8, 30)]


every_family = pytest.mark.parametrize("name", CONFIGS)


@every_family
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_any_split_equals_the_definition(name, sinks, window):
    model, tokens = tiny_model(name), random_tokens(60)
    wanted = reference_logits(model, tokens, sinks, window)
    for parts in (None, [60], random_split(60, seed=1), random_split(60, seed=2, longest=40)):
        assert error(feed(model, SinkCache(model, sinks, window), tokens, parts), wanted) <= TOLERANCE


@every_family
def test_small_chunks_equal_the_definition(name):
    model, tokens = tiny_model(name), random_tokens(60)
    got = model(tokens, SinkCache(model, 4, 9, chunk=7))
    assert error(got, reference_logits(model, tokens, 4, 9)) <= TOLERANCE


@every_family
@pytest.mark.parametrize("origin", [1000, 10**9])
def test_logits_do_not_depend_on_the_place_in_the_text(name, origin):
    model, tokens = tiny_model(name), random_tokens(50)
    wanted = reference_logits(model, tokens, 4, 9)
    for parts in (None, random_split(50, seed=3)):
        got = feed(model, SinkCache(model, 4, 9, origin=origin), tokens, parts)
        assert error(got, wanted) <= TOLERANCE


@every_family
def test_each_row_of_a_ragged_batch_equals_that_stream_alone(name):
    rows = Rows(tiny_model(name), SinkCache(tiny_model(name), 3, 6, 3, chunk=8))
    for seed, lengths in enumerate([[9, 2, 0], [1, 1, 1], [5, 14, 3], [1, 0, 1], [1, 1, 1]]):
        rows.feed(random_tokens(max(lengths), 3, seed=seed), lengths)
    worst = rows.error()
    rows.restart([1])
    for seed in range(4):
        rows.feed(random_tokens(1, 3, seed=10 + seed))
    assert max(worst, rows.error()) <= TOLERANCE


@every_family
def test_a_cache_that_never_evicts_equals_the_dense_forward(name):
    model, tokens = tiny_model(name), random_tokens(40)
    dense = model(tokens)
    got = feed(model, SinkCache(model, 0, 40), tokens, random_split(40, seed=4))
    assert error(got, dense) <= TOLERANCE


@every_family
def test_the_cache_holds_key_heads_and_not_query_heads(name):
    model = tiny_model(name)
    windows = [6 if sliding is None else min(sliding, 6) for sliding in model.geometry.windows]
    kv_heads = getattr(model.config, "kv_heads", model.config.heads)
    assert SinkCache(model, 2, 6).nbytes == sum(2 * kv_heads * (2 + window) * 8 * 8 for window in windows)


ALIBI = ["falcon rw", "falcon rw, 6 heads", "falcon, parallel and alibi"]


@pytest.mark.parametrize("name", ALIBI)
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_alibi_in_bfloat16_does_not_depend_on_the_split(name, sinks, window):
    """Falcon's ALiBi as transformers computes it: bfloat16 slopes times bfloat16 positions inside the cache."""
    model = tiny_model(name, position=Alibi(CONFIGS[name].heads, bfloat16_ranks=True))
    tokens = random_tokens(60)
    one_by_one = feed(model, SinkCache(model, sinks, window), tokens)
    for parts in ([60], random_split(60, seed=1), random_split(60, seed=2, longest=40)):
        assert error(feed(model, SinkCache(model, sinks, window), tokens, parts), one_by_one) <= TOLERANCE
    far_away = feed(model, SinkCache(model, sinks, window, origin=10**9), tokens, random_split(60, seed=5))
    assert error(far_away, one_by_one) <= TOLERANCE
    assert error(feed(model, SinkCache(model, 0, 60), tokens), model(tokens)) <= TOLERANCE


def test_alibi_slopes_are_those_of_the_paper():
    assert Alibi(8).slopes().tolist() == [2.0**-i for i in range(1, 9)]
    assert torch.equal(Alibi(16).slopes(), torch.tensor([2 ** (-i / 2) for i in range(1, 17)]))
    twelve = [2.0**-i for i in range(1, 9)] + [2 ** (-i / 2) for i in (1, 3, 5, 7)]
    assert torch.equal(Alibi(12).slopes(), torch.tensor(twelve))
    assert Alibi(1).slopes().tolist() == [2.0**-8]
    assert Alibi(4, bias_max=16.0).slopes().tolist() == [2.0**-4, 2.0**-8, 2.0**-12, 2.0**-16]
