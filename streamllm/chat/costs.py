"""What operators, methods of texts and filters pay before they make a value that could be large."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import SecurityError

from streamllm.chat.budget import Budget

MAX_BITS = 16_384  # of a whole number
MAX_WIDTH = 999  # to which a number or text is padded by a format
MAX_ROUND_DIGITS = 100
PART_WEIGHT = 4  # for each character of a text that is split: the parts may be single characters
SEARCH_DIVISOR = 64  # two texts of lengths m and n: a search that takes m · n steps costs m · n / 64

# Methods that search from the right, or strip: in CPython, their time can be the product of both lengths.
_SLOW_SEARCHES = frozenset(("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"))


def pay_for_operator(budget: Budget, operator: str, left: Any, right: Any) -> int:
    """Before `left operator right`. Returns what is given back when the text that it makes is no longer in use."""
    if isinstance(left, int) and isinstance(right, int):
        is_power = operator == "**"
        check_bits(left.bit_length() * max(right, 1) if is_power else left.bit_length() + right.bit_length())
    elif operator == "%" and isinstance(left, str):
        _pay_for_percent(budget, left, right)
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                budget.pay(budget.weight(sequence) * max(count, 0))
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        paid = len(left) + len(right)
        budget.pay(paid)
        return paid
    elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        budget.weight(left)  # stops at values that are heavier than the budget
        budget.weight(right)
        budget.pay(len(left) + len(right))  # the elements themselves are not new
    elif operator == "+":
        budget.pay_for(left, right)
    return 0


def check_bits(bits: int) -> None:
    """Raises SecurityError for a whole number of too many bits."""
    if bits > MAX_BITS:
        raise SecurityError(f"it computes with numbers of over {MAX_BITS:,} bits")


def pay_for_format(budget: Budget, text: str, args: Any, kwargs: Any) -> None:
    """Before `text.format(*args, **kwargs)`."""
    fields = 1
    for _, field, spec, _ in string.Formatter().parse(text):
        fields += field is not None
        if spec and re.search(r"\{|\d{4}", spec):
            raise SecurityError(
                f"it pads a text by format(), to more than {MAX_WIDTH} characters or by a variable"
            )
    budget.pay(len(text) + fields * budget.weight([args, kwargs]))


def pay_for_method(
    budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: Any
) -> tuple[Any, ...]:
    """Before `owner.name(*args, **kwargs)`. Returns the arguments to call it with."""
    if not isinstance(owner, str):
        return args
    number = next((each for each in args if isinstance(each, int)), 0)
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.pay(max(number, 0))
    elif name == "expandtabs":
        width = max((8, number, *(each for each in kwargs.values() if isinstance(each, int))))
        budget.pay(width * owner.count("\t"))
    elif name in ("split", "rsplit", "splitlines", "title"):
        budget.pay(PART_WEIGHT * len(owner))
    elif name == "replace":
        _pay_for_replace(budget, owner, *args[:2])
    elif name == "join" and args:
        parts = list(args[0])  # an iterator could be read only once
        budget.pay_for(parts)
        budget.pay(len(owner) * len(parts))
        args = (parts, *args[1:])
    if name in _SLOW_SEARCHES and args and isinstance(args[0], str):
        budget.pay(len(owner) * len(args[0]) // SEARCH_DIVISOR)
    return args


def _pay_for_percent(budget: Budget, text: str, values: Any) -> None:
    """Before `text % values`."""
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4})", text):
        raise SecurityError(f"it pads a text by %, to more than {MAX_WIDTH} characters or by a variable")
    budget.pay(len(text) + (text.count("%") + 1) * budget.weight(values))


def _pay_for_replace(budget: Budget, text: Any, old: Any = "", new: Any = "") -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        budget.pay(len(text) + text.count(old) * len(new))


# Filters. Each function takes the arguments of its filter, without jinja2's context.


def _center(budget: Budget, value: Any, width: Any = 80) -> None:
    budget.pay(max(width, 0))


def _indent(budget: Budget, text: Any, width: Any = 4, *flags: Any, **more: Any) -> None:
    if isinstance(text, str):
        budget.pay(len(text.splitlines()) * (width if isinstance(width, int) else len(width)))


def _format(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    _pay_for_percent(budget, str(text), [args, kwargs])


def _replace(budget: Budget, text: Any, old: Any, new: Any, count: Any = None) -> None:
    _pay_for_replace(budget, str(text), str(old), str(new))


def _join(budget: Budget, values: Any, between: Any = "", attribute: Any = None) -> None:
    budget.pay(len(values) * len(str(between)))


def _split_up(budget: Budget, value: Any) -> None:
    if isinstance(value, str):
        budget.pay(PART_WEIGHT * len(value))


def _trim(budget: Budget, text: Any, characters: Any = None) -> None:
    if isinstance(text, str) and isinstance(characters, str):
        budget.pay(len(text) * len(characters) // SEARCH_DIVISOR)


def _sum(budget: Budget, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise SecurityError("it sums values that are not numbers")


def _batch(budget: Budget, values: Any, count: Any, fill: Any = None) -> None:
    if fill is not None:
        budget.pay(count * budget.weight(fill))


def _round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if isinstance(precision, int) and abs(precision) > MAX_ROUND_DIGITS:
        raise SecurityError(f"it rounds to {precision} digits")


def _tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    weight, depth = budget.weight_and_depth(value)
    width = 0 if indent is None else max(4, indent if isinstance(indent, int) else len(indent))
    between = sum(len(text) for text in separators or ())
    budget.pay(weight * (1 + width * depth + between))


FILTER_COSTS: dict[str, Callable[..., None]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _split_up,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "title": _split_up,
    "tojson": _tojson,
    "trim": _trim,
    "wordcount": _split_up,
}
