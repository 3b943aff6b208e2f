"""The functions that templates on the hub expect, and jinja2's own functions made safe."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace

from streamllm.chat.errors import RefusedByTemplate
from streamllm.weights.errors import shorten

MAX_RANGE_BOUND = 2**31
MAX_TIME_FORMAT_CHARACTERS = 200
MAX_REASON_CHARACTERS = 500


def raise_exception(message: object) -> NoReturn:
    """How a template refuses messages."""
    raise RefusedByTemplate(shorten(str(message), MAX_REASON_CHARACTERS))


def bounded_range(*bounds: int) -> range:
    """`range(…)` of numbers that have different hashes.

    100,000 larger numbers can have the same hash, and a dict of them would take a minute.
    """
    if any(abs(bound) > MAX_RANGE_BOUND for bound in bounds):
        raise SecurityError(f"it counts beyond {MAX_RANGE_BOUND:,}")
    return safe_range(*bounds)


def strftime_now(format: str) -> str:
    """The time now, as `datetime.strftime` formats it."""
    if len(format) > MAX_TIME_FORMAT_CHARACTERS:
        raise SecurityError(f"it formats the time with over {MAX_TIME_FORMAT_CHARACTERS} characters")
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it. jinja2's own filter would write `<` as `\\u003c`."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class DictFunction:
    """`dict(…)` and `dict.fromkeys(…)`, without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class SafeNamespace(Namespace):
    """`namespace(…)`. Its names may not begin with an underscore, and printing it does not show its values."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: a template may use it as a name
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"it stores {shorten(repr(name))} in a namespace; names there may not begin with an underscore"
        )
