"""The law of eviction: after any entries are taken out, the logits equal lists that do it entry by entry.

In float64, against the reference implementation. The law allows 1e-9 standard deviations of the logits.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.cache.entries import MovedEntries
from tests.laws.evicting import EvictingRows
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import (
    ROPES,
    TOLERANCE,
    Interrupted,
    failing,
    random_split,
    random_tokens,
    tiny_llama,
)


def feed(rows: EvictingRows, count: int, seed: int, split: bool = True) -> None:
    """Feed tokens to all rows, one by one or in random parts."""
    tokens = random_tokens(count, rows.cache.batch_size, seed=seed)
    for part in tokens.split(random_split(count, seed=seed) if split else 1, 1):
        rows.feed(part)


def evict_some(rows: EvictingRows, draw: random.Random, of: list[int] | None = None) -> None:
    """Take a random range out of some rows."""
    numbers = list(range(rows.cache.batch_size)) if of is None else of
    least, sinks = min(rows.cache.held[numbers].tolist()), rows.cache.sinks
    if least > sinks:
        start, stop = sorted(draw.randint(sinks, least) for _ in range(2))
        rows.evict_range(start, stop, of)


def run_at_random(rows: EvictingRows, seed: int, turns: int = 12) -> float:
    """Feeds in all ways, evictions, rewinds, in random order."""
    draw, batch = random.Random(seed), rows.cache.batch_size
    for turn in range(turns):
        length = draw.choice([1, 1, 2, 5, draw.randint(1, 2 * rows.cache.window)])
        if batch > 1 and draw.random() < 0.4:
            rows.feed(
                random_tokens(length, batch, seed=seed * 100 + turn),
                [draw.randint(0, length) for _ in range(batch)],
            )
        else:
            feed(rows, length, seed * 100 + turn, split=draw.random() < 0.5)
        some = None if draw.random() < 0.5 else draw.sample(range(batch), draw.randint(1, batch))
        kind = draw.random()
        if kind < 0.6:
            evict_some(rows, draw, some)
        elif kind < 0.75:
            rows.evict_for_space(draw.randint(0, min(rows.cache.window, *rows.streams[0].windows)), some)
        elif kind < 0.9:
            limit = min(rows.cache.rewindable[range(batch) if some is None else some].tolist())
            rows.rewind(draw.randint(0, limit), some)
    feed(rows, 2 * rows.cache.window, seed)
    return rows.worst


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_every_family_equals_the_definition_after_evictions(name, sinks):
    model = tiny_model(name)
    for seed, (window, origin) in enumerate([(9, 0), (14, 0), (9, 10**9)]):
        rows = EvictingRows(model, SinkCache(model, sinks, window, origin=origin, chunk=7))
        assert run_at_random(rows, seed) <= TOLERANCE


@pytest.mark.parametrize("name", ["gpt_neox, dynamic", "falcon rw", "qwen2, three windows", "qwen2"])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_each_row_of_a_ragged_batch_equals_the_definition_after_evictions(name, sinks):
    model = tiny_model(name)
    for seed, (window, origin) in enumerate([(9, 0), (14, 10**9)]):
        rows = EvictingRows(model, SinkCache(model, sinks, window, 3, chunk=7, origin=origin))
        assert run_at_random(rows, seed, turns=20) <= TOLERANCE


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("before", [6, 10, 13, 14, 60])
@pytest.mark.parametrize("split", [False, True])
def test_every_range_of_a_filling_and_of_a_full_window_can_be_taken_out(sinks, before, split):
    model = tiny_llama()
    start = EvictingRows(model, SinkCache(model, sinks, 9))
    feed(start, before, seed=1)
    held = int(start.cache.held[0])
    for first in range(sinks, held + 1):
        for stop in range(first, held + 1):
            rows = start.copy()
            rows.evict_range(first, stop)
            feed(rows, 12, seed=2, split=split)
            assert rows.worst <= TOLERANCE, (first, stop)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_equals_the_definition_after_evictions(rope):
    model = tiny_llama(rope)
    for seed, (sinks, window) in enumerate(
        [(4, 12), (2, 5)]
    ):  # above and below the switch of dynamic and longrope
        rows = EvictingRows(model, SinkCache(model, sinks, window))
        assert run_at_random(rows, seed) <= TOLERANCE


def test_only_the_sinks_may_stay():
    model = tiny_llama()
    for sinks in (0, 3):
        rows = EvictingRows(model, SinkCache(model, sinks, 8))
        feed(rows, 20, seed=1)
        rows.evict_range(sinks, sinks + 8)
        assert rows.cache.held.tolist() == [sinks]
        feed(rows, 20, seed=2)
        rows.evict_for_space(8)
        assert rows.cache.held.tolist() == [sinks]
        feed(rows, 20, seed=3)
        assert rows.worst <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen2", "falcon rw", "qwen2, three windows"])
def test_a_token_that_failed_or_was_undone_has_pushed_an_entry_out(name):
    """What it overwrote is gone, in the rows of any later eviction. The definition then lacks that entry, too."""
    model = tiny_model(name)
    for kind in ("failed", "undone"):
        for later in (None, [1], [0, 2]):
            rows = EvictingRows(model, SinkCache(model, 2, 9, 3))
            rows.feed(random_tokens(40, 3), [40, 30, 9])
            if kind == "failed":
                with failing(model.layers[1]), pytest.raises(Interrupted):
                    model(random_tokens(1, 3, seed=1), rows.cache)
            else:
                model(random_tokens(1, 3, seed=1), rows.cache)
                rows.cache.step_back()
            for stream in rows.streams:  # the definition: each full list has lost its oldest recent entry
                for entries, window in zip(stream.cached, stream.windows, strict=True):
                    del entries[2 : 2 + max(0, len(entries) + 1 - 2 - window)]
            assert rows.cache.held.tolist() == [10, 10, 9]
            rows.evict_range(3, 5, later)
            rows.evict_range(3, 4)
            rows.feed(random_tokens(5, 3, seed=2), [0, 5, 3])
            rows.evict_range(2, 3)
            feed(rows, 30, seed=3)
            assert rows.worst <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen2, three windows", "mpt"])
def test_an_interrupted_eviction_is_completed_by_the_next_use(name, monkeypatch):
    model = tiny_model(name)
    for stops_after in range(4):
        rows = EvictingRows(model, SinkCache(model, 2, 12))
        feed(rows, 30, seed=1)
        commits, commit = [], MovedEntries.commit

        def interrupted(self, commits=commits, commit=commit, stops_after=stops_after):
            if len(commits) >= stops_after:
                raise Interrupted
            commits.append(commit(self))

        with monkeypatch.context() as patch:
            patch.setattr(MovedEntries, "commit", interrupted)
            with contextlib.suppress(Interrupted):
                rows.cache.evict_range(5, 8)
        rows.streams[0].evict_range(5, 8)
        feed(rows, 20, seed=2)
        assert rows.worst <= TOLERANCE


def test_rewind_equals_never_having_fed_the_tokens():
    model = tiny_llama()
    for before, possible, count in [
        (5, 5, 5),
        (12, 12, 9),
        (13, 13, 13),
        (13, 13, 1),
        (14, 1, 1),
        (60, 1, 1),
    ]:
        rows = EvictingRows(model, SinkCache(model, 3, 10))
        feed(rows, before, seed=1)
        assert rows.cache.rewindable.tolist() == [possible]
        rows.rewind(count)
        assert rows.cache.rewindable.tolist() == [possible - count]
        feed(rows, 30, seed=2)
        assert rows.worst <= TOLERANCE


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", ["qwen2, three windows", "falcon rw"])
def test_copies_snapshots_and_states_continue_as_the_cache_would(name, quantize):
    model = tiny_model(name)
    cache = SinkCache(model, 2, 9, 2, quantize=quantize)
    model(random_tokens(30, 2), cache, lengths=[30, 7])
    cache.evict_range(3, 5)
    model(random_tokens(2, 2), cache)
    snapshot = cache.snapshot()
    copy, loaded = cache.copy(), SinkCache(model, 2, 9, 2, quantize=quantize)
    loaded.load_state_dict(snapshot)

    def goes_on(cache):
        assert cache.held.tolist() == [11, 7]
        assert cache.seen.tolist() == [32, 9]
        cache.evict_range(4, 6)
        out = [model(random_tokens(3, 2, seed=4), cache), model(random_tokens(1, 2, seed=5), cache)]
        cache.evict_for_space(5, [0])
        return torch.cat([*out, model(random_tokens(20, 2, seed=6), cache)], 1)

    wanted = goes_on(cache)
    assert torch.equal(goes_on(copy), wanted)
    assert torch.equal(goes_on(loaded), wanted)
    for _ in range(2):
        cache.restore(snapshot)
        assert torch.equal(goes_on(cache), wanted)


@pytest.mark.parametrize("after", ["copy", "restore"])
def test_a_restored_or_forked_stream_equals_the_definition(after):
    model = tiny_model("qwen2, three windows")
    rows = EvictingRows(model, SinkCache(model, 2, 9))
    feed(rows, 20, seed=1)
    rows.evict_range(4, 7)
    feed(rows, 2, seed=2)
    other, snapshot = rows.copy(), rows.cache.snapshot()
    feed(rows, 9, seed=3)
    rows.evict_range(3, 8)
    feed(rows, 9, seed=4)
    if after == "restore":
        rows.cache.restore(snapshot)
        other.cache = rows.cache
    other.evict_range(5, 6)
    feed(other, 30, seed=5)
    assert max(rows.worst, other.worst) <= TOLERANCE


@pytest.mark.parametrize("kind", ["oldest", "newest", "middle"])
def test_an_int8_cache_rounds_only_moved_keys_again(kind):
    """Taking out the oldest or the newest entries moves nothing: the numbers of the others stay."""
    model = tiny_llama()
    cache = SinkCache(model, 2, 40, quantize="int8")
    model(random_tokens(60), cache)
    before = cache.snapshot()
    cache.evict_range(*{"oldest": (2, 9), "newest": (36, 42), "middle": (20, 26)}[kind])
    after = cache.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "rows") == (
        kind != "middle"
    )
