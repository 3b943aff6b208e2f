"""The README's conversion of other libraries' windows: each token attends to the same tokens there and here.

Each `…_attends` below follows one library's rule for what leaves its cache, as its published code does it, on a
list of places. Here, a network of one layer tells: its logits at token t change with token j exactly if t attends
to j.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import streamllm
from streamllm.models import llama
from tests.laws.families import LLAMA
from tests.laws.scenarios import VOCABULARY, randomize

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LENGTH = 40


def start_recent(start: int, recent: int) -> list[set[int]]:
    """streaming-llm's StartRecentKVCache after each forward; attention_sinks does the same in its own class."""
    kept: list[int] = []
    attended = []
    for token in range(LENGTH):
        kept.append(token)  # the forward adds the token's own key before it attends
        attended.append(set(kept))
        if len(kept) > start + recent:
            kept = kept[:start] + kept[-recent:]
    return attended


def evict_for_space(start: int, recent: int, turn: int = 7) -> list[set[int]]:
    """streaming-llm's demo: before each turn of `turn` tokens, the cache makes room for all of them."""
    kept: list[int] = []
    attended = []
    for token in range(LENGTH):
        if token % turn == 0 and len(kept) + turn > start + recent:
            kept = kept[:start] + kept[len(kept) - recent + turn :]
        kept.append(token)
        attended.append(set(kept))
    return attended


def sink_cache(length: int, sinks: int) -> list[set[int]]:
    """transformers 4's SinkCache: a full cache keeps sinks and the last length - sinks - 1 before it adds a key."""
    kept: list[int] = []
    attended = []
    for token in range(LENGTH):
        if len(kept) == length:
            kept = kept[:sinks] + kept[len(kept) - (length - sinks - 1) :]
        kept.append(token)
        attended.append(set(kept))
    return attended


def rotating(length: int, keep: int) -> list[set[int]]:
    """mlx-lm's RotatingKVCache, one token at a time: the oldest key behind `keep` is overwritten."""
    slots: list[int] = []
    index = 0
    attended = []
    for token in range(LENGTH):
        if len(slots) < length:
            slots.append(token)
        else:
            slots[keep + index % (length - keep)] = token
            index += 1
        attended.append(set(slots))
    return attended


def context_shift(length: int, keep: int) -> list[set[int]]:
    """llama.cpp: a full context drops half of what is behind `keep`."""
    kept: list[int] = []
    attended = []
    for token in range(LENGTH):
        if len(kept) == length:
            kept = kept[:keep] + kept[keep + (length - keep) // 2 :]
        kept.append(token)
        attended.append(set(kept))
    return attended


def attends_here(sinks: int, window: int) -> list[set[int]]:
    model = llama.Model(replace(LLAMA, layers=1)).double().eval()
    randomize(model)
    text = torch.arange(LENGTH) % VOCABULARY
    rows = text.repeat(LENGTH + 1, 1)  # row j + 1 has another token at place j
    rows[range(1, LENGTH + 1), range(LENGTH)] = (text + 1) % VOCABULARY
    cache = streamllm.SinkCache(model, sinks, window, batch_size=LENGTH + 1)
    with torch.no_grad():
        logits = model(rows, cache)
    changed = (logits[1:] != logits[:1]).any(-1)  # [j, t]
    return [{place for place in range(LENGTH) if changed[place, token]} for token in range(LENGTH)]


def test_the_network_tells_what_a_token_attends_to():
    for token, places in enumerate(attends_here(2, 6)):
        assert places == {place for place in range(token + 1) if place < 2 or place > token - 6}


@pytest.mark.parametrize(
    ("theirs", "sinks", "window"),
    [
        (start_recent(2, 5), 2, 6),
        (sink_cache(8, 2), 2, 6),
        (rotating(8, 2), 2, 6),
    ],
    ids=["start_recent", "sink_cache", "rotating"],
)
def test_the_same_tokens_are_attended_to(theirs: list[set[int]], sinks: int, window: int):
    assert theirs == attends_here(sinks, window)
    assert theirs != attends_here(sinks, window - 1)


@pytest.mark.parametrize(
    ("theirs", "sinks", "window"),
    [(evict_for_space(4, 10), 4, 10), (context_shift(8, 2), 2, 6)],
    ids=["evict_for_space", "context_shift"],
)
def test_where_many_leave_at_once_the_window_here_is_the_largest_there(
    theirs: list[set[int]], sinks: int, window: int
):
    here = attends_here(sinks, window)
    assert all(there <= seen for there, seen in zip(theirs, here, strict=True))
    assert max(map(len, theirs)) == sinks + window
    assert theirs != here


@pytest.mark.parametrize(
    ("before", "sinks", "window"),
    [
        (r"start_size=(\d+), recent_size=(\d+)", 0, 1),
        (r"attention_sink_size=(\d+), attention_sink_window_size=(\d+)", 0, 1),
    ],
)
def test_the_readme_adds_the_token_itself(before: str, sinks: int, window: int):
    numbers = re.search(rf"{before}.*sinks=(\d+), window=(\d+)", README)
    assert numbers is not None
    start, recent, here_sinks, here_window = map(int, numbers.groups())
    assert (here_sinks, here_window) == (start + sinks, recent + window)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"window_length=(?P<length>\d+), num_sink_tokens=(?P<sinks>\d+)", r"sinks=(\d+), window=(\d+)"),
        (r"-c (?P<length>\d+) --keep (?P<sinks>\d+)", r"--sinks (\d+) --window (\d+)"),
    ],
)
def test_the_readme_subtracts_the_sinks(before: str, after: str):
    numbers = re.search(rf"{before}.*{after}", README)
    assert numbers is not None
    sinks, window = map(int, numbers.groups()[-2:])
    assert (sinks, window) == (int(numbers["sinks"]), int(numbers["length"]) - int(numbers["sinks"]))
