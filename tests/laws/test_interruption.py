"""The law of interruption: after a forward that failed, the stream stands at the end of the last committed chunk.

In float64, against the definition.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress

import pytest
import torch

from streamllm.cache import SinkCache, ring
from tests.laws.scenarios import (
    TOLERANCE,
    Interrupted,
    Rows,
    error,
    failing,
    feed,
    random_split,
    random_tokens,
    reference_logits,
    tiny_llama,
)

SINKS_AND_WINDOWS = [(0, 1), (0, 5), (4, 6), (4, 1), (8, 3), (1, 100)]


def interrupt(model, cache, tokens, layer, chunk=0, **options):
    """Feed tokens, and fail after `layer` of chunk number `chunk`."""
    with failing(model.layers[layer], after=chunk), pytest.raises(Interrupted):
        model(tokens, cache, **options)


@pytest.mark.parametrize("before", [0, 3, 9, 30])
@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_the_same_tokens_can_be_fed_again_after_an_interruption(sinks, window, length, before):
    model, tokens = tiny_llama(), random_tokens(before + length + 12)
    wanted = reference_logits(model, tokens, sinks, window)
    cache = SinkCache(model, sinks, window)
    if before:
        model(tokens[:, :before], cache)
    for layer in range(3):
        interrupt(model, cache, tokens[:, before : before + length], layer)
        assert cache.seen.tolist() == [before]
    again = feed(model, cache, tokens[:, before:], [length, *random_split(12, seed=before, longest=4)])
    assert error(again, wanted[:, before:]) <= TOLERANCE


@pytest.mark.parametrize("before", [0, 3, 30])
@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_other_tokens_fed_after_an_interruption_do_not_see_the_failed_ones(sinks, window, length, before):
    model, tokens, failed = tiny_llama(), random_tokens(before + 25), random_tokens(length, seed=1)
    wanted = reference_logits(model, tokens, sinks, window)
    for layer, parts in [(0, [1] * 25), (1, [25]), (2, random_split(25, seed=6, longest=6))]:
        cache = SinkCache(model, sinks, window, origin=10**9 * layer)
        if before:
            model(tokens[:, :before], cache)
        interrupt(model, cache, failed, layer)
        assert error(feed(model, cache, tokens[:, before:], parts), wanted[:, before:]) <= TOLERANCE


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("chunk", range(4))
def test_an_interrupted_prompt_stands_at_the_end_of_its_last_committed_chunk(chunk, layer):
    model, tokens = tiny_llama(), random_tokens(60)
    for sinks, window in SINKS_AND_WINDOWS:
        cache = SinkCache(model, sinks, window, chunk=9)
        model(tokens[:, :5], cache)
        interrupt(model, cache, tokens[:, 5:], layer, chunk)
        seen = 5 + 9 * chunk
        assert cache.seen.tolist() == [seen]
        wanted = reference_logits(model, tokens, sinks, window)
        assert error(model(tokens[:, seen:], cache), wanted[:, seen:]) <= TOLERANCE


def test_a_ragged_batch_survives_interruptions():
    model = tiny_llama()
    for sinks, window in SINKS_AND_WINDOWS:
        rows = Rows(model, SinkCache(model, sinks, window, 3, chunk=7))
        for turn, lengths in enumerate(
            [[1, 0, 5], [1, 1, 1], [0, 0, 1], [6, 7, 0], [1, 1, 1], None, [3, 0, 1]]
        ):
            longest = 1 if lengths is None else max(lengths)
            options = {} if lengths is None else {"lengths": torch.tensor(lengths)}
            interrupt(model, rows.cache, random_tokens(longest, 3, seed=70 + turn), turn % 3, **options)
            other = [min(longest, 2), longest, 0]
            interrupt(
                model, rows.cache, random_tokens(longest, 3, seed=80 + turn), 2, lengths=torch.tensor(other)
            )
            rows.feed(random_tokens(longest, 3, seed=turn), lengths)
        assert rows.error() <= TOLERANCE


@contextmanager
def failing_write(monkeypatch, at, error):
    """Within this context, writes to layers of the cache raise `error`, from number `at` (from 0) on."""
    write, writes = ring.Ring.write, 0

    def failing_write(self, *moved):
        nonlocal writes
        writes += 1
        if writes > at:
            raise error
        write(self, *moved)

    with monkeypatch.context() as patch:
        patch.setattr(ring.Ring, "write", failing_write)
        yield


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("length", [1, 9])
def test_an_interrupted_write_leaves_the_stream_before_or_after_the_chunk(monkeypatch, at, length):
    """The chunk is seen completely or not at all, and the stored keys and values agree with that."""
    model, tokens = tiny_llama(), random_tokens(60)
    error_type = [KeyboardInterrupt, MemoryError][at % 2]
    for sinks, window in [(0, 5), (4, 6), (8, 3)]:
        for before in (0, 2, 30):
            cache = SinkCache(model, sinks, window)
            if before:
                model(tokens[:, :before], cache)
            failed = random_tokens(length, seed=1) if at % 2 else tokens[:, before : before + length]
            with failing_write(monkeypatch, at, error_type()):
                try:
                    model(failed, cache)
                except error_type:
                    raised = True
                else:
                    raised = False
            seen = cache.seen.item()
            assert seen in ((before, before + length) if raised else (before + length,))
            stream = torch.cat((tokens[:, :before], failed[:, : seen - before], random_tokens(20, seed=2)), 1)
            wanted = reference_logits(model, stream, sinks, window)[:, seen:]
            assert error(feed(model, cache, stream[:, seen:], [1, 1, 8, 10]), wanted) <= TOLERANCE


def test_a_reset_after_an_interruption_starts_an_empty_stream(monkeypatch):
    model, tokens = tiny_llama(), random_tokens(30, rows=2, seed=3)
    for at in range(3):
        cache = SinkCache(model, 2, 4, 2)
        model(random_tokens(20, rows=2), cache)
        with failing_write(monkeypatch, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(random_tokens(9, rows=2, seed=1), cache)
        cache.reset()
        assert error(feed(model, cache, tokens), reference_logits(model, tokens, 2, 4)) <= TOLERANCE


def test_a_reset_works_while_writes_still_fail(monkeypatch):
    model, tokens = tiny_llama(), random_tokens(30, rows=2, seed=3)
    cache = SinkCache(model, 2, 4, 2)
    with failing_write(monkeypatch, 0, MemoryError()):
        with pytest.raises(MemoryError):
            model(random_tokens(9, rows=2, seed=1), cache)
        cache.reset()
        assert cache.seen.tolist() == [0, 0]
    assert error(feed(model, cache, tokens), reference_logits(model, tokens, 2, 4)) <= TOLERANCE


@pytest.mark.parametrize("part", ["embed", "norm", "head"])
def test_a_failure_in_any_part_of_the_model_does_not_change_the_stream(part):
    model, tokens = tiny_llama(), random_tokens(40)
    wanted = reference_logits(model, tokens, 2, 4)
    for keep, length in [(None, 1), (1, 1), (None, 12), (1, 12)]:
        cache = SinkCache(model, 2, 4, chunk=20)
        model(tokens[:, :10], cache)
        with failing(getattr(model, part)), pytest.raises(Interrupted):
            model(random_tokens(length, seed=1), cache, logits_to_keep=keep)
        assert cache.seen.tolist() == [10]
        assert error(model(tokens[:, 10:], cache), wanted[:, 10:]) <= TOLERANCE


@pytest.mark.parametrize("at", [None, 0, 2])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize(("sinks", "window"), SINKS_AND_WINDOWS)
def test_step_back_lets_another_token_follow(monkeypatch, sinks, window, length, at):
    """Also after a forward whose write number `at` was interrupted."""
    model, tokens = tiny_llama(), random_tokens(60)
    for before in (0, 3, 20):
        cache = SinkCache(model, sinks, window)
        if before:
            model(tokens[:, :before], cache)
        fed = torch.cat((tokens[:, before : before + length - 1], random_tokens(1, seed=8)), 1)
        if at is None:
            model(fed, cache)
        else:
            with failing_write(monkeypatch, at, KeyboardInterrupt()), suppress(KeyboardInterrupt):
                model(fed, cache)
        if cache.seen.item() == before:
            continue  # interrupted before the commit
        cache.step_back()
        seen = before + length - 1
        assert cache.seen.tolist() == [seen]
        wanted = reference_logits(model, tokens[:, : seen + 15], sinks, window)[:, seen:]
        assert error(feed(model, cache, tokens[:, seen : seen + 15], [1, 4, 1, 9]), wanted) <= TOLERANCE


def test_a_loaded_state_dict_continues_the_stream():
    model, tokens = tiny_llama(), random_tokens(40, rows=2)
    wanted = reference_logits(model, tokens, 2, 5)
    for before in (1, 4, 25):
        cache, other = SinkCache(model, 2, 5, 2), SinkCache(model, 2, 5, 2)
        model(tokens[:, :before], cache)
        model(random_tokens(11, rows=2, seed=1), other)
        state = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
        model(random_tokens(7, rows=2, seed=2), cache)
        other.load_state_dict(state)
        assert error(feed(model, other, tokens[:, before:]), wanted[:, before:]) <= TOLERANCE
