"""The law of interruption: a forward that failed leaves the stream where its last whole chunk ended.

Float64, against the step-by-step reference; the worst error observed is 3e-14 standard deviations.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress

import pytest
import torch

from streamllm.cache import SinkCache, rings
from tests.laws.scenarios import TOLERANCE, Interrupted, Rows, cuts, defined, error, failing, feed, text, tiny

SHAPES = [(0, 1), (0, 5), (4, 6), (4, 1), (8, 3), (1, 100)]


def interrupt(model, cache, tokens, layer, chunk=0, **options):
    with failing(model.layers[layer], after=chunk), pytest.raises(Interrupted):
        model(tokens, cache, **options)


@pytest.mark.parametrize("before", [0, 3, 9, 30])
@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize(("sinks", "window"), SHAPES)
def test_the_same_tokens_after_an_interruption_give_the_same_logits(sinks, window, length, before):
    model, tokens = tiny(), text(before + length + 12)
    wanted = defined(model, tokens, sinks, window)
    cache = SinkCache(model, sinks, window)
    if before:
        model(tokens[:, :before], cache)
    for layer in range(3):
        interrupt(model, cache, tokens[:, before : before + length], layer)
        assert cache.seen.tolist() == [before]
    again = feed(model, cache, tokens[:, before:], [length, *cuts(12, seed=before, longest=4)])
    assert error(again, wanted[:, before:]) <= TOLERANCE


@pytest.mark.parametrize("before", [0, 3, 30])
@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize(("sinks", "window"), SHAPES)
def test_other_tokens_after_an_interruption_never_saw_the_failed_ones(sinks, window, length, before):
    model, tokens, failed = tiny(), text(before + 25), text(length, seed=1)
    wanted = defined(model, tokens, sinks, window)
    for layer, parts in [(0, [1] * 25), (1, [25]), (2, cuts(25, seed=6, longest=6))]:
        cache = SinkCache(model, sinks, window, origin=10**9 * layer)
        if before:
            model(tokens[:, :before], cache)
        interrupt(model, cache, failed, layer)
        assert error(feed(model, cache, tokens[:, before:], parts), wanted[:, before:]) <= TOLERANCE


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("chunk", range(4))
def test_a_long_prompt_interrupted_stands_at_the_end_of_its_last_whole_chunk(chunk, layer):
    model, tokens = tiny(), text(60)
    for sinks, window in SHAPES:
        cache = SinkCache(model, sinks, window, chunk=9)
        model(tokens[:, :5], cache)
        interrupt(model, cache, tokens[:, 5:], layer, chunk)
        stands = 5 + 9 * chunk
        assert cache.seen.tolist() == [stands]
        wanted = defined(model, tokens, sinks, window)
        assert error(model(tokens[:, stands:], cache), wanted[:, stands:]) <= TOLERANCE


def test_a_ragged_batch_survives_interruptions_everywhere():
    model = tiny()
    for sinks, window in SHAPES:
        rows = Rows(model, SinkCache(model, sinks, window, 3, chunk=7))
        for turn, lengths in enumerate(
            [[1, 0, 5], [1, 1, 1], [0, 0, 1], [6, 7, 0], [1, 1, 1], None, [3, 0, 1]]
        ):
            longest = 1 if lengths is None else max(lengths)
            options = {} if lengths is None else {"lengths": torch.tensor(lengths)}
            interrupt(model, rows.cache, text(longest, 3, seed=70 + turn), turn % 3, **options)
            other = [min(longest, 2), longest, 0]
            interrupt(model, rows.cache, text(longest, 3, seed=80 + turn), 2, lengths=torch.tensor(other))
            rows.feed(text(longest, 3, seed=turn), lengths)
        assert rows.error() <= TOLERANCE


@contextmanager
def failing_write(monkeypatch, at, error):
    """The write number `at` into a layer of the cache raises `error`, and so do later ones until the end."""
    write, writes = rings.Ring.write, 0

    def failing(self, *moved):
        nonlocal writes
        writes += 1
        if writes > at:
            raise error
        write(self, *moved)

    with monkeypatch.context() as patch:
        patch.setattr(rings.Ring, "write", failing)
        yield


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("length", [1, 9])
def test_an_interruption_anywhere_in_writing_is_whole_or_nothing(monkeypatch, at, length):
    """However often it strikes: the chunk counts as seen, or it does not, and what is stored agrees."""
    model, tokens = tiny(), text(60)
    error_type = [KeyboardInterrupt, MemoryError][at % 2]
    for sinks, window in [(0, 5), (4, 6), (8, 3)]:
        for before in (0, 2, 30):
            cache = SinkCache(model, sinks, window)
            if before:
                model(tokens[:, :before], cache)
            failed = text(length, seed=1) if at % 2 else tokens[:, before : before + length]
            with failing_write(monkeypatch, at, error_type()):
                try:
                    model(failed, cache)
                except error_type:
                    struck = True
                else:
                    struck = False
            stands = cache.seen.item()
            assert stands in ((before, before + length) if struck else (before + length,))
            text_now = torch.cat((tokens[:, :before], failed[:, : stands - before], text(20, seed=2)), 1)
            wanted = defined(model, text_now, sinks, window)[:, stands:]
            assert error(feed(model, cache, text_now[:, stands:], [1, 1, 8, 10]), wanted) <= TOLERANCE


def test_a_row_reset_after_an_interruption_starts_from_nothing(monkeypatch):
    model, tokens = tiny(), text(30, rows=2, seed=3)
    for at in range(3):
        cache = SinkCache(model, 2, 4, 2)
        model(text(20, rows=2), cache)
        with failing_write(monkeypatch, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(text(9, rows=2, seed=1), cache)
        cache.reset()
        assert error(feed(model, cache, tokens), defined(model, tokens, 2, 4)) <= TOLERANCE


def test_a_reset_of_all_rows_needs_nothing_of_what_was_interrupted(monkeypatch):
    """Not even that the memory is there now."""
    model, tokens = tiny(), text(30, rows=2, seed=3)
    cache = SinkCache(model, 2, 4, 2)
    with failing_write(monkeypatch, 0, MemoryError()):
        with pytest.raises(MemoryError):
            model(text(9, rows=2, seed=1), cache)
        cache.reset()
        assert cache.seen.tolist() == [0, 0]
    assert error(feed(model, cache, tokens), defined(model, tokens, 2, 4)) <= TOLERANCE


@pytest.mark.parametrize("part", ["embed", "norm", "head"])
def test_whatever_part_of_the_model_fails_the_stream_stands_where_it_stood(part):
    model, tokens = tiny(), text(40)
    wanted = defined(model, tokens, 2, 4)
    for keep, length in [(None, 1), (1, 1), (None, 12), (1, 12)]:
        cache = SinkCache(model, 2, 4, chunk=20)
        model(tokens[:, :10], cache)
        with failing(getattr(model, part)), pytest.raises(Interrupted):
            model(text(length, seed=1), cache, logits_to_keep=keep)
        assert cache.seen.tolist() == [10]
        assert error(model(tokens[:, 10:], cache), wanted[:, 10:]) <= TOLERANCE


@pytest.mark.parametrize("at", [None, 0, 2])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize(("sinks", "window"), SHAPES)
def test_a_stream_taken_back_by_one_token_takes_any_other(monkeypatch, sinks, window, length, at):
    """Also where the storing of what it took in was interrupted."""
    model, tokens = tiny(), text(60)
    for before in (0, 3, 20):
        cache = SinkCache(model, sinks, window)
        if before:
            model(tokens[:, :before], cache)
        taken = torch.cat((tokens[:, before : before + length - 1], text(1, seed=8)), 1)
        if at is None:
            model(taken, cache)
        else:
            with failing_write(monkeypatch, at, KeyboardInterrupt()), suppress(KeyboardInterrupt):
                model(taken, cache)
        if cache.seen.item() == before:
            continue  # it struck before the chunk was one
        cache.step_back()
        stands = before + length - 1
        assert cache.seen.tolist() == [stands]
        wanted = defined(model, tokens[:, : stands + 15], sinks, window)[:, stands:]
        assert error(feed(model, cache, tokens[:, stands : stands + 15], [1, 4, 1, 9]), wanted) <= TOLERANCE


def test_a_state_is_a_stream_that_goes_on_elsewhere():
    model, tokens = tiny(), text(40, rows=2)
    wanted = defined(model, tokens, 2, 5)
    for before in (1, 4, 25):
        cache, other = SinkCache(model, 2, 5, 2), SinkCache(model, 2, 5, 2)
        model(tokens[:, :before], cache)
        model(text(11, rows=2, seed=1), other)
        state = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
        model(text(7, rows=2, seed=2), cache)
        other.load_state_dict(state)
        assert error(feed(model, other, tokens[:, before:]), wanted[:, before:]) <= TOLERANCE
