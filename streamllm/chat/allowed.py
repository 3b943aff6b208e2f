"""What a template may use: attributes by the type of their object, and filters."""

from __future__ import annotations

from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Cycler, Joiner


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# All other attributes are forbidden. `grouper` and `list` belong to the tuples that groupby makes.
ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
        "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split "
        "splitlines startswith strip swapcase title upper zfill"
    ),
    list: _names("copy count index"),
    tuple: _names("count index grouper list"),
    dict: _names("copy get items keys values"),
    int: _names("bit_length is_integer"),
    float: _names("is_integer"),
    LoopContext: _names(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
    Macro: _names("arguments caller catch_kwargs catch_varargs name"),
    Cycler: _names("current items next pos reset"),
    Joiner: _names("sep used"),
}

# Filters that chat templates do not need. The time of striptags grows with the square of the text.
FORBIDDEN_FILTERS = _names("pprint striptags urlize wordwrap xmlattr")

# Filters whose result has only values of their input, so that only the list itself is new.
SELECTING_FILTERS = _names(
    "attr d default dictsort first items last list max min random reject rejectattr reverse select "
    "selectattr sort unique"
)
