"""Window: which tokens of a stream the model can still see, and turns that are taken out of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from streamllm.cache import SinkCache
from streamllm.session.dialogue import Dialogue, Turn
from streamllm.session.view import Drop, Removed

if TYPE_CHECKING:
    from streamllm.stream import Stream

GAP = "\n[…]\n"


def numbers(stream: Stream) -> list[int]:
    """The numbers of the tokens that the cache holds, in the order of its entries."""
    cache = stream.cache
    held, seen, sinks = int(cache.held[0]), stream.seen, cache.sinks
    found, removed = list[int](), stream._view.removed
    number, part = seen, len(removed) - 1
    while len(found) < max(0, held - sinks) and number > 0:
        number -= 1
        while part >= 0 and removed[part].start > number:
            part -= 1
        if part >= 0 and number < removed[part].stop:
            number = removed[part].start
            continue
        found.append(number)
    return [*range(min(held, sinks)), *reversed(found)]


def visible(stream: Stream, special_tokens: bool = False) -> str:
    """The text that the model can still see: the sinks, a mark where a part is missing, and the window."""
    stream._settle()
    loop, tokenizer = stream._loop, stream.tokenizer
    held = numbers(stream)
    sinks = min(len(held), stream.cache.sinks)
    drawn = [] if loop.drawn is None else [loop.drawn]
    recent = held[sinks:] + list(range(loop.seen, loop.seen + len(loop.unfed) + len(drawn)))
    tokens = [*loop.last_tokens(len(recent) - len(drawn)), *drawn]
    if len(recent) > len(tokens):  # another caller has used the cache
        recent = recent[len(recent) - len(tokens) :]
    every = [*zip(range(sinks), stream._view.first[:sinks], strict=False), *zip(recent, tokens, strict=True)]
    parts, before = [""], -1
    decoder = tokenizer.decoder(skip_special_tokens=not special_tokens)
    for number, token in every:
        if number != before + 1 and not _text_goes_on(stream, before + 1, number):
            parts.append("")
        parts[-1] += decoder.push(token)
        before = number
    parts[-1] += decoder.flush()
    return GAP.join(parts)


def _text_goes_on(stream: Stream, start: int, stop: int) -> bool:
    """Whether the numbers start … stop - 1 are those of tokens that were taken back, without a gap in the text."""
    return any(
        (start, stop) == (part.start, part.stop) and not part.leaves_gap for part in stream._view.removed
    )


def _oldest_number(stream: Stream, count: int) -> int:
    """The number of the first of the last `count` tokens that the cache holds. As `numbers`, without a list."""
    number = stream.seen
    for part in reversed(stream._view.removed):
        if part.start >= number:
            continue
        behind = max(0, number - part.stop)
        if behind >= count:
            break
        count -= behind
        number = part.start
    return number - count


def capacity(cache: SinkCache) -> int:
    """How many entries the cache can hold: the sinks, and the longest window of a layer."""
    return cache.sinks + max(min(cache.window, own or cache.window) for own in cache.geometry.windows)


def _next_turn(dialogue: Dialogue, number: int) -> int | None:
    """Where the first turn after a token begins."""
    later = bisect_right(dialogue.turns, number, key=lambda turn: turn.start)
    if later < len(dialogue.turns):
        return dialogue.turns[later].start
    answer = dialogue.answer
    return answer.start if answer is not None and answer.start > number else None


def oldest_turn(stream: Stream) -> tuple[int, int] | None:
    """The entries of the oldest whole turn after the sinks. None where all entries are of one turn."""
    cache = stream.cache
    count = int(cache.held[0]) - cache.sinks
    if count <= 0:
        return None
    first = _oldest_number(stream, count)
    stop = _next_turn(stream._now, first)
    if stop is None:
        return None
    gone = sum(max(0, min(part.stop, stop) - max(part.start, first)) for part in stream._view.removed)
    leave = stop - first - gone
    return (cache.sinks, cache.sinks + leave) if leave < count else None


def make_room(stream: Stream) -> None:
    """Take the oldest whole turn out each time that the window is full and a token waits.

    Tokens that wait are fed as far as there is room, so the result is that of feeding them one by one.
    """
    loop, cache = stream._loop, stream.cache
    size = capacity(cache)
    while True:
        waiting = len(loop.unfed)
        if not waiting or loop.logits is not None:
            return
        room = size - int(cache.held[0])
        if waiting <= room:
            return
        if room > 0:
            read(stream, loop.unfed[:room])
            continue
        entries = oldest_turn(stream)
        if entries is not None:
            cache.evict_range(*entries)
            continue
        # One turn fills the window: its oldest tokens leave, until the next turn begins.
        start = _next_turn(stream._now, stream.seen - 1)
        if start is None or start + 1 - stream.seen >= waiting:
            return
        read(stream, loop.unfed[: start + 1 - stream.seen])


def read(stream: Stream, tokens: Sequence[int]) -> None:
    """Feed the first tokens that wait. What the cache has not seen is what waits."""
    with torch.inference_mode():
        ids = torch.tensor([tokens], dtype=torch.int64, device=stream.cache.device)
        stream.model(ids, stream.cache, logits_to_keep=1)


def drop(stream: Stream, turn: Turn, dialogue: Dialogue) -> None:
    """Take a turn out of the window; its tokens among the sinks stay. dialogue: the conversation without it."""
    loop, cache = stream._loop, stream.cache
    start, stop = max(turn.start, cache.sinks), turn.stop
    if start >= stop:
        stream._dialogue = dialogue
        return
    if stop >= stream._end:
        stream._take_back(start, dialogue)
        return
    loop.push_drawn()
    stream._feed()
    loop.keep_last_unfed()  # its logits depend on what leaves
    held, log = numbers(stream), loop.log
    recent = [*held[cache.sinks :], *range(loop.seen, log.end)]
    history = loop.last_tokens(log.end)
    early = max(0, len(history) - len(recent))
    recent = recent[len(recent) - (len(history) - early) :]
    left = history[:early] + [
        token for number, token in zip(recent, history[early:], strict=True) if not start <= number < stop
    ]
    ranks = [rank for rank, number in enumerate(held) if start <= number < stop and rank >= cache.sinks]
    entries = (ranks[0], ranks[-1] + 1) if ranks else (cache.sinks, cache.sinks)
    oldest = recent[0] if recent else log.end
    stream._dropping = Drop(start, stop, entries, len(held), tuple(left), oldest, dialogue)
    finish_drop(stream)


def finish_drop(stream: Stream) -> None:
    """Complete a `drop`, if one was begun. Each step can be done twice."""
    dropping, cache = stream._dropping, stream.cache
    if dropping is None:
        return
    first, last = dropping.entries
    if first < last and int(cache.held[0]) == dropping.held:
        cache.evict_range(first, last)
    stream._loop.forget(dropping.left)
    view, gone = stream._view, Removed(dropping.start, dropping.stop, True)
    stream._view = replace(view, removed=Removed.add(view.removed, gone, dropping.oldest))
    stream._dialogue = dropping.dialogue
    stream._dropping = None
