"""Slow, plain versions of what streamllm.sampling counts, from the list of the tokens."""

from __future__ import annotations

from collections.abc import Sequence


def ngram_followers(tokens: Sequence[int], size: int) -> set[int]:
    """The tokens that would complete an n-gram which the tokens contain."""
    prefix = list(tokens[len(tokens) - size + 1 :]) if len(tokens) >= size - 1 else None
    return {
        tokens[i + size - 1]
        for i in range(len(tokens) - size + 1)
        if prefix is not None and list(tokens[i : i + size - 1]) == prefix
    }


def dry_lengths(tokens: Sequence[int], breakers: Sequence[Sequence[int]], shortest: int) -> dict[int, int]:
    """For each token that would continue a repetition: the length of the longest one, at least `shortest`.

    Every place in the text is compared with its end, token by token.
    """
    tokens = list(tokens)
    limit = len(tokens)
    for end in range(1, len(tokens) + 1):
        if any(len(b) <= end and tokens[end - len(b) : end] == list(b) for b in breakers):
            limit = len(tokens) - end
    longest: dict[int, int] = {}
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, limit) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= shortest:
            longest[tokens[end]] = max(length, longest.get(tokens[end], 0))
    return longest
