"""The law of streaming: for any sinks, window, split, batch and place, the logits equal the definition.

In float64, against the reference implementation. The law allows 1e-9 standard deviations of the logits.
"""

from __future__ import annotations

import pytest
import torch

from streamllm.cache import SinkCache, ring
from tests.laws.scenarios import (
    ROPES,
    TOLERANCE,
    Rows,
    error,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)

SINKS = [0, 1, 4, 8]
WINDOWS = [1, 2, 7, 16, 500]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", SINKS)
def test_token_by_token_equals_the_definition(sinks, window):
    model, tokens = tiny_llama(), random_tokens(60)
    got = feed(model, SinkCache(model, sinks, window), tokens)
    assert error(got, reference_logits(model, tokens, sinks, window)) <= TOLERANCE


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("seed", range(2))
def test_any_split_equals_the_definition(sinks, window, seed):
    model, tokens = tiny_llama(), random_tokens(60)
    parts = random_split(60, seed=seed, longest=[5, 40][seed])
    cache = SinkCache(model, sinks, window)
    wanted = reference_logits(model, tokens, sinks, window)
    assert error(feed(model, cache, tokens, parts), wanted) <= TOLERANCE
    assert cache.seen.tolist() == [60]


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", SINKS)
def test_a_long_prompt_equals_the_definition_for_any_chunk(sinks, window, chunk):
    model, tokens = tiny_llama(), random_tokens(60)
    got = model(tokens, SinkCache(model, sinks, window, chunk=chunk))
    assert error(got, reference_logits(model, tokens, sinks, window)) <= TOLERANCE


@pytest.mark.parametrize("step_slots", [1, 3, 8])
def test_empty_slots_of_a_filling_ring_are_not_seen(monkeypatch, step_slots):
    """The ring is read in steps of slots, and the last step that is read may have empty slots."""
    monkeypatch.setattr(ring, "READ_STEP_SLOTS", step_slots)
    model, tokens = tiny_llama(), random_tokens(60)
    for sinks, window in [(0, 30), (4, 16), (8, 500)]:
        cache = SinkCache(model, sinks, window, origin=10**9 * (step_slots % 2))
        assert error(feed(model, cache, tokens), reference_logits(model, tokens, sinks, window)) <= TOLERANCE
        rows = Rows(model, SinkCache(model, sinks, window, 3))
        for seed, lengths in enumerate([[9, 2, 0], [1, 1, 1], [5, 14, 3], *[[1, 1, 1]] * 4]):
            rows.feed(random_tokens(max(lengths), 3, seed=seed), lengths)
        assert rows.error() <= TOLERANCE


def test_a_prompt_of_hundreds_of_windows_equals_the_definition():
    model, tokens = tiny_llama(), random_tokens(900)
    wanted = reference_logits(model, tokens, 2, 5)
    for chunk in (4, 100, 512, 4096):
        assert error(model(tokens, SinkCache(model, 2, 5, chunk=chunk)), wanted) <= TOLERANCE


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_every_rope_and_head_grouping_equals_the_definition(rope, heads):
    model, tokens = tiny_llama(rope, *heads), random_tokens(40)
    for sinks, window in [(4, 9), (3, 4)]:  # above and below the length at which dynamic and longrope change
        wanted = reference_logits(model, tokens, sinks, window)
        for parts in ([40], random_split(40, seed=1), [30, *[1] * 10]):
            assert error(feed(model, SinkCache(model, sinks, window), tokens, parts), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [{"tied": True}, {"attention_bias": False, "mlp_bias": False}, {"head_dim": 12}, {"layers": 1}],
    ids=lambda changes: ", ".join(changes),
)
def test_other_shapes_of_llama_equal_the_definition(changes):
    model, tokens = tiny_llama(**changes), random_tokens(60)
    wanted = reference_logits(model, tokens, 2, 6)
    assert error(feed(model, SinkCache(model, 2, 6), tokens, random_split(60, seed=2)), wanted) <= TOLERANCE


@pytest.mark.parametrize("rope", ROPES)
def test_a_cache_that_never_evicts_equals_the_dense_forward(rope):
    model, tokens = tiny_llama(rope), random_tokens(60)
    dense = model(tokens)
    for sinks in (0, 4, 8):  # S + W = T, because dynamic and longrope depend on it
        got = feed(model, SinkCache(model, sinks, 60 - sinks), tokens, random_split(60, seed=3))
        assert error(got, dense) <= TOLERANCE


def test_the_dense_forward_is_causal_and_equals_the_definition_without_eviction():
    model, tokens = tiny_llama(), random_tokens(60, rows=3)
    dense = model(tokens)
    assert error(dense, reference_logits(model, tokens, 0, 60)) <= TOLERANCE
    assert error(model(tokens[:, :20]), dense[:, :20]) <= TOLERANCE


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("origin", [10**9, 10**12])
def test_logits_do_not_depend_on_the_place_in_the_text(origin, rope):
    model, tokens = tiny_llama(rope), random_tokens(40)
    for sinks, window in [(4, 9), (0, 5)] if rope != "default" else [(4, 9), (0, 5), (4, 1), (8, 100)]:
        wanted = reference_logits(model, tokens, sinks, window)
        for parts in ([40], random_split(40, seed=4), [25, *[1] * 15]):
            cache = SinkCache(model, sinks, window, origin=origin, chunk=16)
            assert error(feed(model, cache, tokens, parts), wanted) <= TOLERANCE


@pytest.mark.parametrize("keep", [1, 2, 7, 40, 100])
@pytest.mark.parametrize("chunk", [3, 16, 512])
def test_logits_to_keep_returns_the_last_rows(keep, chunk):
    model, tokens = tiny_llama(), random_tokens(40, rows=2)
    wanted = reference_logits(model, tokens, 2, 6)[:, -keep:]
    assert error(model(tokens, SinkCache(model, 2, 6, 2, chunk), logits_to_keep=keep), wanted) <= TOLERANCE
    assert error(model(tokens, logits_to_keep=keep), model(tokens)[:, -keep:]) <= TOLERANCE


@pytest.mark.parametrize("keep", [1, 3, 9])
@pytest.mark.parametrize("chunk", [2, 5, 512])
def test_logits_to_keep_returns_the_last_rows_of_each_ragged_row(keep, chunk):
    model, tokens, lengths = tiny_llama(), random_tokens(20, rows=5), [20, 13, 9, 1, 0]
    got = model(tokens, SinkCache(model, 2, 6, 5, chunk), lengths=torch.tensor(lengths), logits_to_keep=keep)
    wanted = reference_logits(model, tokens, 2, 6)
    assert got.shape[1] == keep
    for row, length in enumerate(lengths[:-1]):  # the last row has no tokens
        last = [max(length - keep + i, 0) for i in range(keep)]
        assert error(got[row], wanted[row, last]) <= TOLERANCE


@pytest.mark.parametrize("origin", [0, 10**9])
@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 5), (1, 1), (4, 1), (4, 6), (8, 3), (3, 200)])
def test_each_row_of_a_ragged_batch_equals_that_stream_alone(sinks, window, chunk, origin):
    model = tiny_llama()
    rows = Rows(model, SinkCache(model, sinks, window, 4, chunk, origin))
    for seed, lengths in enumerate(
        [
            [2, 0, 1, 9],  # the first forward, with fewer tokens than sinks in some rows
            [1, 1, 1, 1],
            [0, 1, 1, 0],  # one token for some rows
            [0, 0, 0, 0],  # no tokens
            [7, 30, 0, 2],
            None,
            [1, 0, 12, 12],
        ]
    ):
        longest = 5 if lengths is None else max(lengths) + (seed % 2)  # with padding in every row
        rows.feed(random_tokens(max(longest, 1), rows=4, seed=seed), lengths)
        assert rows.cache.seen.tolist() == [len(fed) for fed in rows.fed]
        if lengths is None:
            for extra in range(3):
                rows.feed(random_tokens(1, rows=4, seed=100 + extra))
    assert rows.error() <= TOLERANCE


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_start_and_end_at_different_times_equal_streams_alone(seed):
    model, generator = tiny_llama(), torch.Generator().manual_seed(seed)
    draw = lambda top: int(torch.randint(top + 1, (1,), generator=generator))  # noqa: E731
    sinks, window = [(2, 5), (0, 4), (8, 2), (4, 1), (1, 30), (5, 5)][seed]
    rows, worst = Rows(model, SinkCache(model, sinks, window, 3, chunk=1 + draw(12))), 0.0
    for turn in range(20):
        kind = draw(9)
        length = 1 if kind < 5 else 1 + draw(24)
        lengths = None if kind in (0, 1, 5) else [draw(length) for _ in range(3)]
        rows.feed(random_tokens(length, rows=3, seed=1000 * seed + turn), lengths)
        if draw(6) == 0:
            worst = max(worst, rows.error())
            rows.restart([row for row in range(3) if draw(1)])
    assert max(worst, rows.error()) <= TOLERANCE


def test_rows_return_to_lockstep():
    model = tiny_llama()
    rows = Rows(model, SinkCache(model, 2, 5, 2))
    rows.feed(random_tokens(9, rows=2), [9, 4])
    rows.feed(random_tokens(5, rows=2, seed=1), [0, 5])
    assert rows.cache.seen.tolist() == [9, 9]
    for seed in range(12):
        rows.feed(random_tokens(1, rows=2, seed=seed))
    rows.feed(random_tokens(20, rows=2, seed=50))
    assert rows.error() <= TOLERANCE


def test_padding_tokens_have_no_effect():
    model, tokens, lengths = tiny_llama(), random_tokens(12, rows=3), torch.tensor([12, 5, 0])
    padded = torch.where(torch.arange(12) < lengths[:, None], tokens, random_tokens(12, rows=3, seed=9))
    caches = [SinkCache(model, 2, 4, 3), SinkCache(model, 2, 4, 3)]
    one, other = (model(t, c, lengths=lengths) for t, c in zip((tokens, padded), caches, strict=True))
    assert torch.equal(one[1, :5], other[1, :5])
    after = [feed(model, cache, random_tokens(8, rows=3, seed=2)) for cache in caches]
    assert torch.equal(*after)


def test_a_reset_cache_starts_a_new_stream():
    model = tiny_llama()
    cache = SinkCache(model, 4, 5, 2)
    feed(model, cache, random_tokens(40, rows=2), [7, 33])
    cache.reset()
    tokens = random_tokens(30, rows=2, seed=5)
    wanted = reference_logits(model, tokens, 4, 5)
    assert error(feed(model, cache, tokens, random_split(30, seed=5)), wanted) <= TOLERANCE


def test_tokens_may_be_int32_or_strided():
    model, tokens = tiny_llama(), random_tokens(40, rows=2)
    wanted = reference_logits(model, tokens, 2, 5)
    assert error(model(tokens.int(), SinkCache(model, 2, 5, 2)), wanted) <= TOLERANCE
    strided = tokens.t().contiguous().t()
    assert error(model(strided, SinkCache(model, 2, 5, 2)), wanted) <= TOLERANCE
    wanted = reference_logits(model, tokens[:, ::2], 2, 5)
    assert error(model(tokens[:, ::2], SinkCache(model, 2, 5, 2)), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 3e-6), (torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str
)
@pytest.mark.parametrize("origin", [0, 10**9])
def test_errors_of_smaller_dtypes_do_not_grow_along_the_stream(dtype, allowed, origin):
    """A key is rounded once, however long it stays in the cache."""
    model, tokens = tiny_llama("llama3", dtype=dtype), random_tokens(400)
    cache = SinkCache(model, 4, 40, origin=origin)
    got = feed(model, cache, tokens, [50, *[1] * 150, 150, *[1] * 50]).double()
    difference = (got - reference_logits(model, tokens, 4, 40)).abs()[0].mean(1) / got.std()
    early, late = difference[:100].mean(), difference[-100:].mean()
    assert early <= allowed
    assert late <= 1.5 * early
