"""Budget: how many steps, how much time and how much memory a template may still use."""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any, NoReturn

from streamllm.chat.errors import ChatTemplateError

# A template may make this much more than the messages hold, and `Limits.size` on top.
SIZE_PER_INPUT = 256

_CONTAINERS = (str, list, tuple, dict, KeysView, ValuesView, ItemsView)


@dataclass(frozen=True)
class Limits:
    """What a template may use for one prompt. Templates on the hub use far less.

    Args:
        steps: blocks, calls, filters, tests, comparisons and operators that are evaluated.
        seconds: elapsed time.
        size: characters of text and elements of lists that it makes, beyond 256 times those of its input.
        template: characters of the template itself.
    """

    steps: int = 5_000_000
    seconds: float = 5.0
    size: int = 4_000_000
    template: int = 100_000


class Budget:
    """What is left of `Limits`, and the weight of values.

    The weight of a value is about what it would take to write it down: its characters, its elements, and
    everything inside, as often as it occurs. An operation that makes a value pays its weight, so no value is
    heavier than the budget. Operations on a value without a step (to compare, hash, sort or print it) take time in
    proportion to its weight.
    """

    def __init__(self, limits: Limits, given: Mapping[str, Any]) -> None:
        self._limits = limits
        self._steps_left = limits.steps
        self._end = time.monotonic() + limits.seconds
        self._size_left = 2**62  # for the next line
        self._size_left = limits.size + SIZE_PER_INPUT * self.weight(given)

    def step(self) -> bool:
        """Takes a step. The value is always true, so that a step can be part of an expression."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ChatTemplateError(
                f"the chat template was stopped: it takes more than {self._limits.steps:,} steps"
            )
        if time.monotonic() > self._end:
            raise ChatTemplateError(
                f"the chat template was stopped: it takes more than {self._limits.seconds} seconds"
            )
        return True

    def pay(self, amount: int) -> None:
        """Takes an amount of characters and elements."""
        self._size_left -= amount
        if self._size_left < 0:
            self._too_large()

    def pay_for(self, *values: Any) -> None:
        """Takes the weight of each value."""
        for value in values:
            self.pay(self.weight(value))

    def weight(self, value: Any) -> int:
        """The weight of a value."""
        return self.weight_and_depth(value)[0]

    def weight_and_depth(self, value: Any) -> tuple[int, int]:
        """The weight of a value, and how many levels of containers it has.

        It works level by level, without recursion, and stops at values that are heavier than the budget.
        """
        weight, depth = 0, 0
        level = [value]
        while level:
            depth += 1
            inner: list[Any] = []
            for each in level:
                weight += 1
                if isinstance(each, _CONTAINERS):
                    weight += len(each)
                    if weight > self._size_left:
                        self._too_large()
                    if isinstance(each, dict):
                        inner.extend(each.values())
                    if not isinstance(each, str):
                        inner.extend(each)
            level = inner
        return weight, depth

    def _too_large(self) -> NoReturn:
        raise ChatTemplateError(
            f"the chat template was stopped: it makes more text or lists than {self._limits.size:,} "
            f"characters and elements"
        )
