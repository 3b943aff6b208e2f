"""Whole numbers as arguments: what every call checks before it changes anything."""

from __future__ import annotations

from operator import index
from typing import Any


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int: also a NumPy integer or a tensor of one. Raises ValueError for others, True and False.

    `least` and `most` are allowed, too.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        if least is None:
            allowed = "a whole number"
        elif most is None:
            allowed = f"a whole number of at least {least}"
        else:
            allowed = f"a whole number in {least} … {most}"
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    return number
