"""Histories: counters after any pushes equal those of a new history, and interrupts change nothing."""

from __future__ import annotations

import random
import sys
from collections import Counter
from functools import partial

import pytest

from streamllm.sampling import History
from streamllm.sampling.counters import NgramCounts, TokenCounts
from streamllm.sampling.dry import RepeatedSuffixes
from tests.unit.sampling.plain import dry_lengths, ngram_followers

BREAKERS = ((3,), (1, 2), (2, 2, 0))


def observe(history: History, window: int) -> dict[str, object]:
    """What all the counters say."""
    counts = history.counter(TokenCounts, window)
    return {
        "counts": dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True)),
        "ngrams": set(history.counter(NgramCounts, window, 3).following()),
        "share": history.loop_share(window),
        "repeats": history.counter(RepeatedSuffixes, window, BREAKERS).continuations(1),
    }


def expected(tokens: list[int], window: int) -> dict[str, object]:
    """The same from the tokens, in plain Python."""
    tokens = tokens[-window:] if window else []
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return {
        "counts": dict(Counter(tokens)),
        "ngrams": ngram_followers(tokens, 3),
        "share": pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0.0),
        "repeats": dry_lengths(tokens, BREAKERS, 1),
    }


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 17, 64])
@pytest.mark.parametrize("alphabet", [1, 2, 5])
def test_counters_equal_plain_ones_and_those_of_a_rebuilt_history(window: int, alphabet: int) -> None:
    draw = random.Random(window * 10 + alphabet)
    history, tokens = History(window), []
    for _ in range(120):
        new = [draw.randrange(alphabet) for _ in range(draw.choice((0, 1, 1, 1, 2, 9, 70)))]
        history.extend(new) if len(new) != 1 else history.push(new[0])
        tokens += new
        assert history.last(window) == tokens[-window:]
        if draw.random() < 0.7:  # at other times, counters have several pushes to catch up with
            found = observe(history, window)
            assert found == expected(tokens, window)
            assert observe(History(window, tokens[-window:]), window) == found


def test_a_history_keeps_the_last_tokens_and_not_many_more() -> None:
    history = History(100)
    for token in range(5000):
        history.push(token)
        assert history.last(100) == list(range(max(0, token - 99), token + 1))
        assert len(history) < 2 * 100 + History.SLACK
    assert history.last(0) == []
    history.grow(300)
    history.grow(200)
    history.extend(range(5000, 6000))
    assert history.last(300) == list(range(5700, 6000))
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        History(0)


def test_a_counter_with_other_parameters_replaces_the_one_before() -> None:
    history = History(50, [1, 2, 1, 2, 1])
    assert history.counter(NgramCounts, 50, 2).following() == (2,)
    assert set(history.counter(NgramCounts, 50, 1).following()) == {1, 2}
    assert history.counter(NgramCounts, 50, 1) is history.counter(NgramCounts, 50, 1)
    assert len(history._counters) == 1


def test_the_loop_share_of_a_loop_and_of_new_text() -> None:
    assert History(600, range(600)).loop_share() == 0
    assert History(600, [5, 6, 7, 8, 9] * 120).loop_share(512) == pytest.approx(1 - 5 / 509)
    assert History(600).loop_share() == 0
    half = History(600, [*range(256), *([1, 2, 3, 4] * 64)])
    assert 0.45 < half.loop_share(512) < 0.55


class Interrupt(BaseException):
    """As KeyboardInterrupt, but nothing else raises it."""


@pytest.mark.parametrize("use", ["push", "read"])
def test_an_interrupt_at_any_line_leaves_the_history_whole(use: str) -> None:
    """Raises at each line of the package that a push, or reading the counters after it, runs."""
    draw = random.Random(1)
    tokens = [draw.randrange(3) for _ in range(90)]
    line = 0
    while True:
        history = History(16, tokens[:-1])
        observe(history, 16)
        if use == "read":
            history.push(tokens[-1])
        call = partial(history.push, tokens[-1]) if use == "push" else partial(observe, history, 16)
        interrupted = interrupt_at(line, call)
        if history.last(16) != tokens[-16:]:
            assert use == "push"
            assert history.last(16) == tokens[-17:-1]  # as before, as a whole
            assert observe(history, 16) == expected(tokens[:-1], 16)
            history.push(tokens[-1])
        assert observe(history, 16) == expected(tokens, 16)
        if not interrupted:
            break
        line += 1
    assert line > (3 if use == "push" else 60)


def interrupt_at(line: int, call) -> bool:
    """Whether `call` was interrupted: before it ran so many lines of streamllm.sampling."""
    passed = 0

    def trace(frame, event, _):
        nonlocal passed
        if (
            "/sampling/" not in frame.f_code.co_filename.replace("\\", "/")
            or __file__ == frame.f_code.co_filename
        ):
            return None
        if event == "line":
            if passed == line:
                passed += 1
                raise Interrupt
            passed += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False
