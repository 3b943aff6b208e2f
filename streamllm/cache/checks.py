"""Arguments of a cache: numbers, rows, ranges of entries, the model that it meets. Each raises ValueError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index

from torch import Tensor

from streamllm.models.checks import whole_number
from streamllm.models.step import Geometry


def row_numbers(rows: Sequence[int] | Tensor | None, batch_size: int) -> list[int]:
    """The rows, each once, in order. None: all."""
    if rows is None:
        return list(range(batch_size))
    given = rows.tolist() if isinstance(rows, Tensor) else rows
    try:
        numbers = [-1 if isinstance(row, bool) else index(row) for row in given]
    except TypeError:
        numbers = [-1]
    if not all(0 <= number < batch_size for number in numbers):
        raise ValueError(f"rows must be a list of row numbers in 0 … {batch_size - 1}, not {given}")
    return sorted(set(numbers))


def check_at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        whole_number(name, value, least)


def check_range(start: int, stop: int, sinks: int) -> None:
    check_at_least(0, start=start, stop=stop)
    if start < sinks:
        raise ValueError(
            f"the range {start} … {stop} touches the sinks, which stay: start must be at least {sinks}"
        )
    if stop < start:
        raise ValueError(f"stop must not be below start, and the range is {start} … {stop}")


def check_up_to(stop: int, held: Mapping[int, int]) -> None:
    """held: the entries of each row that the range is for."""
    for row, count in held.items():
        if stop > count:
            raise ValueError(f"row {row} holds {count} entries: stop must be at most {count}, not {stop}")


def check_room(n: int, window: int) -> None:
    check_at_least(0, n=n)
    if n > window:
        raise ValueError(f"n must be at most {window}, the longest window of a layer, not {n}")


def check_rewind(n: int, limits: Mapping[int, int]) -> None:
    """limits: how far each row can go back."""
    for row, limit in limits.items():
        if n > limit:
            raise ValueError(
                f"row {row} can go back by at most {limit} tokens, not {n}: what later tokens pushed out is "
                f"overwritten; evict_range(held - {n}, held) takes the newest entries out without bringing it back"
            )


def check_same_sizes(own: Geometry, other: Geometry) -> None:
    """Whether a cache for one model serves another, such as a copy of it."""
    sizes = [(geometry.kv_heads, geometry.head_dim, geometry.windows) for geometry in (own, other)]
    if sizes[0] != sizes[1]:
        (heads, dim, windows), (other_heads, other_dim, other_windows) = sizes
        raise ValueError(
            f"the cache was made for another model, of {len(windows)} layers with {heads} heads of {dim}; "
            f"this one has {len(other_windows)} layers with {other_heads} heads of {other_dim}"
            f"{', and other sliding windows' if set(windows) != set(other_windows) else ''}: "
            f"make a SinkCache for it"
        )
