"""Checks of the settings of `GenerationConfig` that are lists, or that keep a text from repeating itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from operator import index
from typing import Any

from streamllm.weights.errors import show

MOST_SHOWN = 80  # characters of a wrong value in an error


def _is_whole(value: Any, least: int) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and index(value) >= least


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # NumPy's numbers, too


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} must be {allowed}, not {show(value, MOST_SHOWN)}")


def _number(name: str, value: Any) -> float:
    if not _is_number(value) or not math.isfinite(value):
        raise _wrong(name, value, "a finite number")
    return float(value)


def _number_from(least: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not least <= value < math.inf:
            raise _wrong(name, value, f"a finite number of at least {least:g}")
        return float(value)

    return check


def _whole_from(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if not _is_whole(value, least):
            raise _wrong(name, value, f"a whole number of at least {least}")
        return index(value)

    return check


def _range(name: str, value: Any) -> int | None:
    if value is not None and not _is_whole(value, -1):
        raise _wrong(name, value, "a number of tokens, 0 to look at none, or None or -1 for the window")
    return None if value is None else index(value)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if not _is_list(value) or not all(_is_whole(token, 0) for token in value):
        raise _wrong(name, value, "a list of token ids")
    return tuple(index(token) for token in value)


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not _is_list(value) or not all(_is_sequence_of_ids(sequence) for sequence in value):
        raise _wrong(name, value, "a list of lists of token ids, none of them empty")
    return tuple(tuple(index(token) for token in sequence) for sequence in value)


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not _is_list(pairs) or not all(
        _is_list(pair)
        and len(pair) == 2
        and _is_whole(pair[0], 0)
        and _is_number(pair[1])
        and pair[1] < math.inf
        for pair in pairs
    ):
        raise _wrong(name, value, "a mapping from token ids to numbers, or to -inf")
    return tuple(sorted((index(token), float(bias)) for token, bias in dict(pairs).items()))


def _breakers(name: str, value: Any) -> tuple[str | tuple[int, ...], ...] | None:
    if value is None:
        return None
    if not _is_list(value) or not all(
        (isinstance(breaker, str) and breaker) or _is_sequence_of_ids(breaker) for breaker in value
    ):
        raise _wrong(name, value, "a list of strings or of lists of token ids, none of them empty")
    return tuple(breaker if isinstance(breaker, str) else tuple(breaker) for breaker in value)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_sequence_of_ids(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(_is_whole(token, 0) for token in value)


def _number_in(fits: Callable[[float], bool], allowed: str) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not fits(value):
            raise _wrong(name, value, allowed)
        return float(value)

    return check


def _top_k(name: str, value: Any) -> int:
    if not _is_whole(value, 0):
        raise _wrong(name, value, "0 (all) or above, a whole number")
    return index(value)


def _eos(name: str, value: Any) -> tuple[int, ...]:
    tokens = value if _is_list(value) else [value]
    if not all(hasattr(token, "__index__") and not isinstance(token, bool) for token in tokens):
        raise _wrong(name, value, "a token id or a list of them")
    return tuple(index(token) for token in tokens)


# For each field, a function of its name and value: the value as the field keeps it, or ValueError.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _number_in(lambda value: 0 <= value < math.inf, "0 (greedy) or above"),
    "top_k": _top_k,
    "top_p": _number_in(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": _number_in(lambda value: 0 <= value <= 1, "in 0 … 1"),
    "repetition_penalty": _number_in(lambda value: 0 < value < math.inf, "above 0"),
    "eos": _eos,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "repeat_last_n": _range,
    "no_repeat_ngram_size": _whole_from(0),
    "bad_words_ids": _sequences,
    "min_new_tokens": _whole_from(0),
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "logit_bias": _bias,
    "dry_multiplier": _number_from(0),
    "dry_base": _number_from(1),
    "dry_allowed_length": _whole_from(1),
    "dry_penalty_last_n": _range,
    "dry_sequence_breakers": _breakers,
}
