"""Would the law notice? Each wrong reading of it, applied on purpose, must move the logits by a clear margin.

The readings are those that other systems were seen to have, and those that this code could slip into.
Observed: 2.6 standard deviations of the logits and more, and 7e-5 for a place times a frequency in float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streamllm import cache as cache_module
from streamllm.cache import SinkCache
from streamllm.models import llama, rotary
from tests.laws.scenarios import TOLERANCE, Rows, cuts, defined, error, feed, text, tiny

S, W = 4, 6
MARGIN = 1e-6
FAR = 10**12


def one_by_one(sinks=S, window=W):
    model, tokens = tiny(), text(40)
    return error(feed(model, SinkCache(model, sinks, window), tokens), defined(model, tokens, S, W))


def in_chunks(sinks=S, window=W):
    model, tokens = tiny(), text(40)
    got = feed(model, SinkCache(model, sinks, window), tokens, [7, 1, 3, 15, 1, *cuts(13, seed=1)])
    return error(got, defined(model, tokens, S, W))


def far_away():
    model, tokens = tiny(), text(40)
    cache = SinkCache(model, S, W, origin=FAR)
    return error(feed(model, cache, tokens, [3, 1, 1, 16, 1, 18]), defined(model, tokens, S, W))


def ragged():
    model = tiny()
    rows = Rows(model, SinkCache(model, S, W, 3))
    for seed, lengths in enumerate([[9, 2, 0], [1, 1, 1], [5, 14, 3], [1, 1, 1], [1, 1, 1], [2, 3, 5]]):
        rows.feed(text(max(lengths), 3, seed=seed), lengths)
    worst = rows.error()
    rows.restart([1])
    for seed in range(4):
        rows.feed(text(1, 3, seed=10 + seed))
    return max(worst, rows.error())


SCENARIOS = [one_by_one, in_chunks, far_away, ragged]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_unchanged_the_law_holds(scenario):
    assert scenario() <= TOLERANCE


def planned(patch, change, only=("_plan_one", "_plan_chunk")):
    """What a plan says (step, moves) goes through `change(step, moves, window, seen, counts)`."""
    for name in only:
        maker = getattr(cache_module, name)

        def changed(sinks, window, origin, seen, counts, length, device, maker=maker):
            step, moves = maker(sinks, window, origin, seen, counts, length, device)
            return change(step, moves, window, seen, counts)

        patch.setattr(cache_module, name, changed)


def places(step):
    """Where the queries stand, counted from 0."""
    return step.near - FAR if step.near.min() >= FAR else step.near


def seeing(step, allowed):
    """The step, with the visibility `allowed(key, query)` says, places counted from 0."""
    far_away = step.near.min() >= FAR
    keys = torch.where(step.keys >= FAR - 1, step.keys - FAR, step.keys) if far_away else step.keys
    key, query = keys[:, None, :], places(step)[:, :, None]
    return replace(step, visible=(key >= 0) & allowed(key, query))


def within(key, query, window=W, ahead=0):
    return (key <= query + ahead) & ((key < S) | (key > query - window))


def slot_off_by_one(patch):
    def change(step, moves, window, seen, counts):
        if moves.early is None:  # a new sink
            return step, moves
        rows, tokens, slots = moves.early
        return step, replace(moves, early=(rows, tokens, S + (slots - S + 1) % window))

    planned(patch, change, ["_plan_one"])


def ring_turns_over_the_sinks_too(patch):
    def change(step, moves, window, seen, counts):
        if moves.early is None:
            return step, moves
        rows, tokens, _ = moves.early
        slots = places(step)[slice(None) if rows is None else rows, 0] % (S + window)
        return step, replace(moves, early=(rows, tokens, slots))

    planned(patch, change, ["_plan_one"])


def window_one_longer_in_a_chunk(patch):
    def change(step, moves, *_):
        return seeing(step, lambda k, q: within(k, q, W + 1)), moves

    planned(patch, change, ["_plan_chunk"])


def window_one_shorter_in_a_chunk(patch):
    def change(step, moves, *_):
        return seeing(step, lambda k, q: within(k, q, W - 1)), moves

    planned(patch, change, ["_plan_chunk"])


def chunk_sees_one_token_ahead(patch):
    def change(step, moves, *_):
        return seeing(step, lambda k, q: within(k, q, ahead=1)), moves

    planned(patch, change, ["_plan_chunk"])


def chunk_forgets_the_sinks(patch):
    def change(step, moves, *_):
        return seeing(step, lambda k, q: (k <= q) & (k > q - W)), moves

    planned(patch, change, ["_plan_chunk"])


def new_sinks_are_seen_twice(patch):
    def change(step, moves, window, seen, counts):
        own = places(step)  # the keys of the chunk itself stand at its places
        keys = torch.cat((step.keys[:, : -own.shape[1]], own), 1)
        return seeing(replace(step, keys=keys), within), moves

    planned(patch, change, ["_plan_chunk"])


def a_run_of_one_key_more(patch):
    def change(step, moves, *_):
        return replace(step, band=step.band and replace(step.band, window=W + 1)), moves

    planned(patch, change, ["_plan_chunk"])


def a_run_of_one_key_less(patch):
    def change(step, moves, *_):
        return replace(step, band=step.band and replace(step.band, window=W - 1)), moves

    planned(patch, change, ["_plan_chunk"])


def a_run_read_in_the_order_of_its_slots(patch):
    def change(step, moves, *_):
        return step, replace(moves, parts=tuple(sorted(moves.parts)))

    planned(patch, change, ["_plan_chunk"])


def sinks_do_not_travel(patch):
    planned(patch, lambda step, moves, *_: (replace(step, far=places(step)), moves))


def far_query_is_the_near_query(patch):
    planned(patch, lambda step, moves, *_: (replace(step, sinks=0), moves))


def far_query_one_place_too_far(patch):
    def change(step, moves, window, *_):
        return replace(step, far=places(step).clamp(max=S + window)), moves

    planned(patch, change)


def one_sink_too_few_travels(patch):
    planned(patch, lambda step, moves, *_: (replace(step, sinks=max(0, step.sinks - 1)), moves))


def a_recent_key_travels_too(patch):
    planned(patch, lambda step, moves, *_: (replace(step, sinks=step.sinks + 1 if step.sinks else 0), moves))


def sinks_rotated_at_their_place_in_the_text(patch):
    planned(patch, lambda step, moves, *_: (replace(step, own=step.near), moves))


def keys_rotated_at_their_slot(patch):
    planned(patch, lambda step, moves, *_: (replace(step, own=step.slots), moves))


def stale_slots_are_visible(patch):
    planned(patch, lambda step, moves, *_: (replace(step, visible=None), moves), ["_plan_one"])


def visible_by_slot_instead_of_place(patch):
    def by_slot(sinks, window, seen, held):
        slot = torch.arange(held)
        return torch.where(slot < seen, slot, -1)

    patch.setattr(cache_module, "_held_places", by_slot)


def a_chunk_takes_its_slots_before_it_is_read(patch):
    append = cache_module._Memory.append

    def rash(self, k, v):
        if self._moves.late is not None:
            self._ring.write(self._moves.late, k, v)
        return append(self, k, v)

    patch.setattr(cache_module._Memory, "append", rash)


def padding_is_stored(patch):
    maker = cache_module._plan_chunk

    def storing(sinks, window, origin, seen, counts, length, device):
        step, _ = maker(sinks, window, origin, seen, counts, length, device)
        _, moves = maker(sinks, window, origin, seen, [length] * len(seen), length, device)
        return step, replace(moves, parts=((0, step.keys.shape[1] - length),))

    patch.setattr(cache_module, "_plan_chunk", storing)


def padding_is_counted(patch):
    plan = SinkCache.plan

    def counting(self, length, lengths=None):
        return replace(plan(self, length, lengths), advance=[length] * self.batch_size)

    patch.setattr(SinkCache, "plan", counting)


def all_rows_stand_where_the_first_stands(patch):
    def change(step, moves, *_):
        return replace(step, near=step.near[:1], far=step.far[:1], own=step.own[:1]), moves

    planned(patch, change)


def a_row_that_joins_is_not_reset(patch):
    patch.setattr(SinkCache, "reset", lambda self, rows=None: None)


def angles_in_float32(patch):
    tables = rotary._tables
    patch.setattr(rotary, "_tables", lambda rope, *rest: tables(replace(rope, float32_angles=True), *rest))


def angles_of_an_unsplit_place(patch):
    def tables(rope, places, span, dtype):
        angles = places.double()[..., None] * rope.frequencies(span).double()
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).unsqueeze(-3), torch.cat((-sin, sin), -1).unsqueeze(-3)

    patch.setattr(rotary, "_tables", tables)


def neighbouring_dimensions_turn_together(patch):
    def turn(x, cos, sin):
        half = x.shape[-1] // 2
        pairs = x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
        return (
            (pairs * cos + pairs.roll(half, -1) * sin).unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
        )

    patch.setattr(rotary, "_turn", turn)


def query_heads_dealt_out_in_turn(patch):
    attend, order = llama.attend, [0, 2, 1, 3]
    patch.setattr(
        llama,
        "attend",
        lambda near, far, *rest, **named: attend(near[:, order], far[:, order], *rest, **named)[:, order],
    )


MUTATIONS = [
    slot_off_by_one,
    ring_turns_over_the_sinks_too,
    window_one_longer_in_a_chunk,
    window_one_shorter_in_a_chunk,
    chunk_sees_one_token_ahead,
    chunk_forgets_the_sinks,
    new_sinks_are_seen_twice,
    a_run_of_one_key_more,
    a_run_of_one_key_less,
    a_run_read_in_the_order_of_its_slots,
    sinks_do_not_travel,
    far_query_is_the_near_query,
    far_query_one_place_too_far,
    one_sink_too_few_travels,
    a_recent_key_travels_too,
    sinks_rotated_at_their_place_in_the_text,
    keys_rotated_at_their_slot,
    stale_slots_are_visible,
    visible_by_slot_instead_of_place,
    a_chunk_takes_its_slots_before_it_is_read,
    padding_is_stored,
    padding_is_counted,
    all_rows_stand_where_the_first_stands,
    a_row_that_joins_is_not_reset,
    angles_in_float32,
    angles_of_an_unsplit_place,
    neighbouring_dimensions_turn_together,
    query_heads_dealt_out_in_turn,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_law_notices(mutation, monkeypatch):
    mutation(monkeypatch)
    moved = {scenario.__name__: scenario() for scenario in SCENARIOS}
    assert max(moved.values()) > MARGIN, moved


@pytest.mark.parametrize("scenario", [one_by_one, in_chunks])
@pytest.mark.parametrize(
    ("sinks", "window"), [(S, W + 1), (S, W - 1), (S - 1, W + 1), (S + 1, W - 1), (0, S + W), (0, W)]
)
def test_the_law_notices_other_sizes(scenario, sinks, window):
    """The query on top of the window, the sinks inside of it, no sinks."""
    assert scenario(sinks, window) > MARGIN
