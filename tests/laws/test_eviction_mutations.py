"""Mutations of eviction: faults made on purpose, which must change the logits by more than the tolerance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamllm.cache import SinkCache, entries, ring, rolling_cache, sink_cache
from streamllm.models import rotary
from tests.laws.evicting import EvictingRows
from tests.laws.families import tiny_model
from tests.laws.scenarios import TOLERANCE, Interrupted, failing, random_tokens, tiny_llama

MARGIN = 1e-6  # standard deviations of the logits; the tolerance of the laws is 1e-9
S, W = 3, 10


def evict_and_feed(rows: EvictingRows, feed) -> float:
    """Ranges on both sides of the middle, the oldest and the newest entries."""
    rows.feed(random_tokens(31, rows.cache.batch_size))
    for seed, (start, stop) in enumerate([(S + 2, S + 4), (S + 6, S + 8), (S, S + 2), (S + 8, S + 10)]):
        rows.evict_range(start, stop)
        feed(rows, 1 + seed % 2, 10 + seed)
        rows.evict_range(S + 1, S + 3, [0])
        feed(rows, 14, 20 + seed)
    return rows.worst


def tokens(rows, count, seed):
    for part in random_tokens(count, rows.cache.batch_size, seed=seed).split(1, 1):
        rows.feed(part)


def chunks(rows, count, seed):
    rows.feed(random_tokens(count, rows.cache.batch_size, seed=seed))


def one_by_one():
    return evict_and_feed(EvictingRows(tiny_llama("yarn"), SinkCache(tiny_llama("yarn"), S, W)), tokens)


def in_chunks():
    return evict_and_feed(EvictingRows(tiny_llama(), SinkCache(tiny_llama(), S, W)), chunks)


def ragged():
    return evict_and_feed(EvictingRows(tiny_llama(), SinkCache(tiny_llama(), S, W, 2)), chunks)


def rows_one_by_one():
    return evict_and_feed(EvictingRows(tiny_llama(), SinkCache(tiny_llama(), S, W, 2)), tokens)


def shorter_windows():
    model = tiny_model("qwen2, upper layers slide")
    return evict_and_feed(EvictingRows(model, SinkCache(model, S, W)), tokens)


def alibi():
    return evict_and_feed(EvictingRows(tiny_model("mpt"), SinkCache(tiny_model("mpt"), S, W)), tokens)


def after_a_failure():
    model = tiny_llama()
    rows = EvictingRows(model, SinkCache(model, S, W))
    chunks(rows, 31, 1)
    with failing(model.layers[1]), pytest.raises(Interrupted):
        model(random_tokens(1, seed=2), rows.cache)
    rows.streams[0].evict_range(S, S + 1)  # pushed out
    rows.evict_range(S + 4, S + 6)
    tokens(rows, 12, 3)
    return rows.worst


SCENARIOS = [one_by_one, in_chunks, ragged, rows_one_by_one, shorter_windows, alibi, after_a_failure]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_a_mutation_the_law_holds(scenario):
    assert scenario() <= TOLERANCE


def change_what_is_left(patch, change):
    """Replace t, the row and the shifts after an eviction by `change(t, row, shifts)`."""
    without = entries.without
    patch.setattr(entries, "without", lambda *given: change(*without(*given)))


def start_one_too_late(patch):
    def change(t, row, shifts):
        return t, replace(row, starts=tuple(min(start + 1, t) for start in row.starts)), shifts

    change_what_is_left(patch, change)


def start_one_too_early(patch):
    def change(t, row, shifts):
        return t, replace(row, starts=tuple(max(start - 1, S) for start in row.starts)), shifts

    change_what_is_left(patch, change)


def keys_moved_by_one_place_too_many(patch):
    moved = rotary.moved_keys
    patch.setattr(sink_cache, "moved_keys", lambda rope, keys, by, n: moved(rope, keys, by + 1, n))


def keys_not_rotated(patch):
    patch.setattr(sink_cache, "moved_keys", lambda rope, keys, by, n: keys)


def keys_rotated_in_the_other_direction(patch):
    moved = rotary.moved_keys
    patch.setattr(sink_cache, "moved_keys", lambda rope, keys, by, n: moved(rope, keys, -by, n))


def keys_scaled_once_more(patch):
    """By the attention factor of yarn."""
    moved = rotary.moved_keys
    factor = "attention_factor"
    patch.setattr(sink_cache, "moved_keys", lambda rope, *rest: moved(rope, *rest) * getattr(rope, factor))


def nothing_is_moved(patch):
    change_what_is_left(
        patch, lambda t, row, shifts: (t, row, tuple(replace(s, stop=s.first) for s in shifts))
    )


def moved_to_the_next_slot(patch):
    replaced = ring.Ring.replace

    def later(self, rows, slots, *taken):
        replaced(self, rows, S + (slots - S + 1) % (self.keys.shape[2] - S), *taken)

    patch.setattr(ring.Ring, "replace", later)


def one_entry_too_few_is_moved(patch):
    def change(t, row, shifts):
        return t, row, tuple(replace(s, stop=max(s.first, s.stop - 1)) for s in shifts)

    change_what_is_left(patch, change)


def values_stay_behind(patch):
    replaced = ring.Ring.replace

    def keys_only(self, rows, slots, keys, values):
        replaced(self, rows, slots, keys, self.values[rows, :, slots])

    patch.setattr(ring.Ring, "replace", keys_only)


def sinks_do_not_close_up(patch):
    place = ring.Layout.sink_query_place
    patch.setattr(ring.Layout, "sink_query_place", lambda self, t, start=None: place(self, t))


def sinks_one_place_too_far(patch):
    place = ring.Layout.sink_query_place

    def farther(self, t, start=None):
        return place(self, t, None if start is None else start - 1 * (start > S))

    patch.setattr(ring.Layout, "sink_query_place", farther)


def a_token_sees_what_was_taken_out(patch):
    plan = rolling_cache.plan_token
    patch.setattr(
        rolling_cache,
        "plan_token",
        lambda layout, origin, kind, t, start: plan(layout, origin, kind, t, start - 1),
    )


def a_chunk_sees_what_was_taken_out(patch):
    plan = rolling_cache.plan_chunk

    def wrong(layout, origin, t, start, *rest):
        return plan(layout, origin, t, max(S, start - 1), *rest)

    patch.setattr(rolling_cache, "plan_chunk", wrong)


def a_ragged_chunk_sees_what_was_taken_out(patch):
    plan = rolling_cache.plan_ragged_chunk

    def wrong(layout, origin, t, starts, *rest):
        return plan(layout, origin, t, [max(S, start - 1) for start in starts], *rest)

    patch.setattr(rolling_cache, "plan_ragged_chunk", wrong)


def shorter_lists_keep_all(patch):
    def change(t, row, shifts):
        return t, replace(row, starts=(row.starts[0], *(S for _ in row.starts[1:]))), shifts

    change_what_is_left(patch, change)


def rows_have_the_start_of_the_first(patch):
    plan = rolling_cache.plan_token
    patch.setattr(
        rolling_cache,
        "plan_token",
        lambda layout, origin, kind, t, start: plan(layout, origin, kind, t, start[:1].expand(len(t))),
    )


def all_rows_are_evicted(patch):
    numbers = sink_cache.row_numbers
    patch.setattr(sink_cache, "row_numbers", lambda rows, batch: numbers(None, batch))


def a_failed_token_is_not_counted_as_written(patch):
    patch.setattr(SinkCache, "_written_rows", lambda self: self._rows)


MUTATIONS = [
    start_one_too_late,
    start_one_too_early,
    keys_moved_by_one_place_too_many,
    keys_not_rotated,
    keys_rotated_in_the_other_direction,
    keys_scaled_once_more,
    nothing_is_moved,
    moved_to_the_next_slot,
    one_entry_too_few_is_moved,
    values_stay_behind,
    sinks_do_not_close_up,
    sinks_one_place_too_far,
    a_token_sees_what_was_taken_out,
    a_chunk_sees_what_was_taken_out,
    a_ragged_chunk_sees_what_was_taken_out,
    shorter_lists_keep_all,
    rows_have_the_start_of_the_first,
    all_rows_are_evicted,
    a_failed_token_is_not_counted_as_written,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_breaks_the_law(mutation, monkeypatch):
    mutation(monkeypatch)
    monkeypatch.setattr(EvictingRows, "check_held", lambda self: None)  # the logits must tell
    errors = {}
    for scenario in SCENARIOS:
        try:
            errors[scenario.__name__] = scenario()
        except ValueError:  # a range that is now behind the newest entry
            continue
    assert max(errors.values(), default=0) > MARGIN, errors
