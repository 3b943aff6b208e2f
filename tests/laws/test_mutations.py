"""Mutations: faults of streaming, made on purpose, that must change the logits by more than the tolerance.

Some are faults of other systems, the rest are plausible faults of this code.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamllm.cache import SinkCache, chunks, ring, rolling_cache
from streamllm.models import attention, llama, rotary
from tests.laws.scenarios import (
    TOLERANCE,
    Rows,
    error,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)

S, W = 4, 6
MARGIN = 1e-6  # standard deviations of the logits; the tolerance of the laws is 1e-9
FAR_ORIGIN = 10**12


def one_by_one(sinks=S, window=W):
    model, tokens = tiny_llama(), random_tokens(40)
    return error(feed(model, SinkCache(model, sinks, window), tokens), reference_logits(model, tokens, S, W))


def in_chunks(sinks=S, window=W):
    model, tokens = tiny_llama(), random_tokens(40)
    got = feed(model, SinkCache(model, sinks, window), tokens, [7, 1, 3, 15, 1, *random_split(13, seed=1)])
    return error(got, reference_logits(model, tokens, S, W))


def far_from_the_start():
    model, tokens = tiny_llama(), random_tokens(40)
    cache = SinkCache(model, S, W, origin=FAR_ORIGIN)
    return error(feed(model, cache, tokens, [3, 1, 1, 16, 1, 18]), reference_logits(model, tokens, S, W))


def ragged():
    model = tiny_llama()
    rows = Rows(model, SinkCache(model, S, W, 3))
    for seed, lengths in enumerate([[9, 2, 0], [1, 1, 1], [5, 14, 3], [1, 1, 1], [1, 1, 1], [2, 3, 5]]):
        rows.feed(random_tokens(max(lengths), 3, seed=seed), lengths)
    worst = rows.error()
    rows.restart([1])
    for seed in range(4):
        rows.feed(random_tokens(1, 3, seed=10 + seed))
    return max(worst, rows.error())


SCENARIOS = [one_by_one, in_chunks, far_from_the_start, ragged]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_a_mutation_the_law_holds(scenario):
    assert scenario() <= TOLERANCE


TOKEN, CHUNK, RAGGED = "plan_token", "plan_chunk", "plan_ragged_chunk"


def change_plans(patch, change, only=(TOKEN, CHUNK, RAGGED)):
    """Replace the step and the writes of every plan by `change(step, writes, window)`."""
    for name in only:
        plan = getattr(rolling_cache, name)

        def changed(layout, *rest, plan=plan):
            step, writes = plan(layout, *rest)
            return change(step, writes, layout.window)

        patch.setattr(rolling_cache, name, changed)


def query_places(step):
    """Counted from 0, whatever the origin."""
    return step.query_place - FAR_ORIGIN if step.query_place.min() >= FAR_ORIGIN else step.query_place


def with_visibility(step, allowed):
    """The step with the visibility `allowed(key, query)`, of places that are counted from 0."""
    keys = step.key_place
    if step.query_place.min() >= FAR_ORIGIN:
        keys = torch.where(keys >= FAR_ORIGIN - 1, keys - FAR_ORIGIN, keys)
    key, query = keys[:, None, :], query_places(step)[:, :, None]
    return replace(step, visible=(key >= 0) & allowed(key, query), band=None)


def within(key, query, window=W, ahead=0):
    return (key <= query + ahead) & ((key < S) | (key > query - window))


def slot_off_by_one(patch):
    def change(step, writes, window):
        move = writes.now
        if move.to_sinks:
            return step, writes
        return step, replace(writes, now=replace(move, slots=S + (move.slots - S + 1) % window))

    change_plans(patch, change, [TOKEN])


def slot_of_a_chunk_off_by_one(patch):
    def change(step, writes, window):
        move = writes.on_commit
        wrong = replace(move, slots=S + (move.slots - S + 1) % window, ranges=())
        return step, replace(writes, on_commit=wrong)

    change_plans(patch, change, [CHUNK])


def the_ring_includes_the_sinks(patch):
    def change(step, writes, window):
        if writes.now.to_sinks:
            return step, writes
        return step, replace(writes, now=replace(writes.now, slots=query_places(step)[:, 0] % (S + window)))

    change_plans(patch, change, [TOKEN])


def window_one_longer_in_a_chunk(patch):
    def change(step, writes, window):
        return with_visibility(step, lambda k, q: within(k, q, W + 1)), writes

    change_plans(patch, change, [RAGGED])


def window_one_shorter_in_a_chunk(patch):
    def change(step, writes, window):
        return with_visibility(step, lambda k, q: within(k, q, W - 1)), writes

    change_plans(patch, change, [RAGGED])


def window_one_longer_everywhere(patch):
    visible = chunks.is_visible

    def longer(key, query, sinks, window):
        return visible(key, query, sinks, window + 1)

    for module in (chunks, attention):
        patch.setattr(module, "is_visible", longer)


def chunk_sees_one_token_ahead(patch):
    def change(step, writes, window):
        return with_visibility(step, lambda k, q: within(k, q, ahead=1)), writes

    change_plans(patch, change, [RAGGED])


def chunk_does_not_see_the_sinks(patch):
    def change(step, writes, window):
        return with_visibility(step, lambda k, q: (k <= q) & (k > q - W)), writes

    change_plans(patch, change, [RAGGED])


def new_sinks_are_seen_twice(patch):
    def change(step, writes, window):
        new = query_places(step)  # the keys of the chunk itself are at its places
        keys = torch.cat((step.key_place[:, : -new.shape[1]], new), 1)
        return with_visibility(replace(step, key_place=keys), within), writes

    change_plans(patch, change, [RAGGED])


def window_one_longer_in_a_band(patch):
    def change(step, writes, window):
        return replace(step, band=replace(step.band, window=W + 1)), writes

    change_plans(patch, change, [CHUNK])


def window_one_shorter_in_a_band(patch):
    def change(step, writes, window):
        return replace(step, band=replace(step.band, window=W - 1)), writes

    change_plans(patch, change, [CHUNK])


def keys_of_a_chunk_in_the_order_of_slots(patch):
    def change(step, writes, window):
        return step, replace(writes, reads=tuple(sorted(writes.reads)))

    change_plans(patch, change, [CHUNK])


def a_chunk_without_sinks(patch):
    def change(step, writes, window):
        kept = tuple(part for part in writes.reads if part[0] >= S)
        columns = step.band.columns
        step = replace(
            step, band=replace(step.band, columns=0), key_place=step.key_place[:, columns:], sinks=0
        )
        return step, replace(writes, reads=kept)

    change_plans(patch, change, [CHUNK])


def sinks_do_not_move_with_the_window(patch):
    change_plans(patch, lambda step, writes, _: (replace(step, sink_query_place=query_places(step)), writes))


def sinks_are_scored_by_the_recent_query(patch):
    change_plans(patch, lambda step, writes, _: (replace(step, sinks=0), writes))


def sink_query_one_place_too_far(patch):
    def change(step, writes, window):
        return replace(step, sink_query_place=query_places(step).clamp(max=S + window)), writes

    change_plans(patch, change)


def one_sink_too_few_moves_with_the_window(patch):
    change_plans(patch, lambda step, writes, _: (replace(step, sinks=max(0, step.sinks - 1)), writes))


def a_recent_key_moves_with_the_window(patch):
    change_plans(
        patch, lambda step, writes, _: (replace(step, sinks=step.sinks + 1 if step.sinks else 0), writes)
    )


def sinks_rotated_at_their_place_in_the_text(patch):
    change_plans(patch, lambda step, writes, _: (replace(step, new_key_place=step.query_place), writes))


def keys_rotated_at_their_slot(patch):
    change_plans(patch, lambda step, writes, _: (replace(step, new_key_place=step.slots), writes))


def stale_slots_are_visible(patch):
    change_plans(patch, lambda step, writes, _: (replace(step, visible=None), writes), [TOKEN])


def visible_by_slot_instead_of_place(patch):
    patch.setattr(
        ring.Layout, "token_in", lambda self, slot, seen: torch.where(slot < seen, slot + 0 * seen, -1)
    )


def a_chunk_is_stored_before_it_reads_the_ring(patch):
    append = ring.LayerStore.append

    def writing_first(self, k, v):
        if self.writes.on_commit is not None:
            self.ring.write(self.writes.on_commit, k, v)
        return append(self, k, v)

    patch.setattr(ring.LayerStore, "append", writing_first)


def padding_is_stored(patch):
    plan = rolling_cache.plan_ragged_chunk

    def storing_padding(layout, origin, seen, starts, counts, length, device):
        step, _ = plan(layout, origin, seen, starts, counts, length, device)
        _, writes = plan(layout, origin, seen, starts, [length] * len(seen), length, device)
        return step, replace(writes, reads=((0, step.key_place.shape[1] - length),))

    patch.setattr(rolling_cache, "plan_ragged_chunk", storing_padding)


def padding_is_counted(patch):
    plan = SinkCache.plan

    def counting_padding(self, length, lengths=None):
        return replace(plan(self, length, lengths), advance=[length] * self.batch_size)

    patch.setattr(SinkCache, "plan", counting_padding)


def all_rows_have_the_places_of_the_first(patch):
    def change(step, writes, _):
        names = "query_place", "sink_query_place", "new_key_place"
        return replace(step, **{name: getattr(step, name)[:1] for name in names}), writes

    change_plans(patch, change)


def a_new_row_is_not_reset(patch):
    patch.setattr(SinkCache, "reset", lambda self, rows=None: None)


def merge_ignores_the_sums_of_its_parts(patch):
    merge = attention.merge
    patch.setattr(attention, "merge", lambda reads: merge([(out, 0 * lse) for out, lse in reads]))


def only_the_first_part_is_read(patch):
    patch.setattr(attention, "merge", lambda reads: reads[0][0])


def angles_in_float32(patch):
    table = rotary._table
    patch.setattr(rotary, "_table", lambda rope, *rest: table(replace(rope, float32_angles=True), *rest))


def angles_from_the_unsplit_place(patch):
    def table(rope, places, rope_length, dtype):
        angles = places.double()[..., None] * rope.frequencies(rope_length).double()
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).unsqueeze(-3), torch.cat((-sin, sin), -1).unsqueeze(-3)

    patch.setattr(rotary, "_table", table)


def adjacent_dimensions_rotate_together(patch):
    def rotate(x, table):
        (cos, sin), half = table, x.shape[-1] // 2
        pairs = x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
        return (
            (pairs * cos + pairs.roll(half, -1) * sin).unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
        )

    patch.setattr(rotary, "_rotate", rotate)


def query_heads_assigned_to_key_heads_in_turn(patch):
    attend, order = llama.attend, [0, 2, 1, 3]

    def wrong(query, sink_query, *rest, **named):
        sink_query = None if sink_query is None else sink_query[:, order]
        return attend(query[:, order], sink_query, *rest, **named)[:, order]

    patch.setattr(llama, "attend", wrong)


MUTATIONS = [
    slot_off_by_one,
    slot_of_a_chunk_off_by_one,
    the_ring_includes_the_sinks,
    window_one_longer_in_a_chunk,
    window_one_shorter_in_a_chunk,
    window_one_longer_everywhere,
    chunk_sees_one_token_ahead,
    chunk_does_not_see_the_sinks,
    new_sinks_are_seen_twice,
    window_one_longer_in_a_band,
    window_one_shorter_in_a_band,
    keys_of_a_chunk_in_the_order_of_slots,
    a_chunk_without_sinks,
    sinks_do_not_move_with_the_window,
    sinks_are_scored_by_the_recent_query,
    sink_query_one_place_too_far,
    one_sink_too_few_moves_with_the_window,
    a_recent_key_moves_with_the_window,
    sinks_rotated_at_their_place_in_the_text,
    keys_rotated_at_their_slot,
    stale_slots_are_visible,
    visible_by_slot_instead_of_place,
    a_chunk_is_stored_before_it_reads_the_ring,
    padding_is_stored,
    padding_is_counted,
    all_rows_have_the_places_of_the_first,
    a_new_row_is_not_reset,
    merge_ignores_the_sums_of_its_parts,
    only_the_first_part_is_read,
    angles_in_float32,
    angles_from_the_unsplit_place,
    adjacent_dimensions_rotate_together,
    query_heads_assigned_to_key_heads_in_turn,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_breaks_the_law(mutation, monkeypatch):
    mutation(monkeypatch)
    errors = {scenario.__name__: scenario() for scenario in SCENARIOS}
    assert max(errors.values()) > MARGIN, errors


@pytest.mark.parametrize("scenario", [one_by_one, in_chunks])
@pytest.mark.parametrize(
    ("sinks", "window"), [(S, W + 1), (S, W - 1), (S - 1, W + 1), (S + 1, W - 1), (0, S + W), (0, W)]
)
def test_other_sinks_and_windows_break_the_law(scenario, sinks, window):
    """Other readings of the sizes: the query not counted in the window, a sink more or less, no sinks."""
    assert scenario(sinks, window) > MARGIN
