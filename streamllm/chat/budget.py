"""Budget: how many steps, how much time and how much memory a template may still use."""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any, NoReturn

from streamllm.chat.errors import ChatTemplateError

# A template may make this much more than the messages hold, and `Limits.size` on top.
SIZE_PER_INPUT = 256
# Templates that look back at each earlier message take a number of steps that grows with the square of the messages.
# The limits of steps and seconds grow by their own size with so many objects and lists in the input, or characters.
CONTAINERS_PER_SCALE = 1_000
CHARACTERS_PER_SCALE = 1_000_000
# Reading the clock takes as long as a step, so it is read after so many steps, or so much that was made.
STEPS_PER_CLOCK = 16
SIZE_PER_CLOCK = 100_000
MIN_TEXT_TO_REFUND = 256  # characters; a shorter text is paid for, even if it does not live long

_CONTAINERS = (str, list, tuple, dict, KeysView, ValuesView, ItemsView)


@dataclass(frozen=True)
class Limits:
    """What a template may use for one prompt. Templates on the hub use far less.

    The first two grow with the input: they hold for up to 1,000 objects and lists and 1 million characters.

    Args:
        steps: blocks, calls, filters, tests, comparisons and operators that are evaluated.
        seconds: time of the processor, not of the clock.
        size: characters of text and elements of lists that it makes, beyond 256 times those of its input. The
            text of `a + b` and `a ~ b` counts only as long as it is in use.
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
        self._size_left = 2**62  # for the next line
        weight, _, containers = self._measure(given)
        scale = 1 + containers // CONTAINERS_PER_SCALE + weight // CHARACTERS_PER_SCALE
        self._steps = self._steps_left = limits.steps * scale
        self._seconds = limits.seconds * scale
        self._end = time.thread_time() + self._seconds
        self._size = self._size_left = limits.size + SIZE_PER_INPUT * weight
        self._steps_at_clock, self._size_at_clock = self._steps_left, self._size_left

    def step(self) -> bool:
        """Takes a step. The value is always true, so that a step can be part of an expression."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ChatTemplateError(
                f"the chat template was stopped: it takes more than {self._steps:,} steps"
            )
        if (
            self._steps_at_clock - self._steps_left >= STEPS_PER_CLOCK
            or self._size_at_clock - self._size_left >= SIZE_PER_CLOCK
        ):
            self._steps_at_clock, self._size_at_clock = self._steps_left, self._size_left
            if time.thread_time() > self._end:
                raise ChatTemplateError(
                    f"the chat template was stopped: it takes more than {self._seconds:g} seconds of the processor"
                )
        return True

    def pay(self, amount: int) -> None:
        """Takes an amount of characters and elements."""
        self._size_left -= amount
        if self._size_left < 0:
            self._too_large()

    def refund(self, amount: int) -> None:
        """Gives back what was paid for a value that is no longer in use."""
        self._size_left += amount

    def joined(self, text: str, paid: int) -> str:
        """A text that was joined from others, for which `paid` is given back when it is no longer in use.

        A template that writes a prompt into a variable, part by part, makes a new text for each part, and the one
        before is no longer in use. Only the last one takes memory.
        """
        if len(text) < MIN_TEXT_TO_REFUND:
            return text
        tracked = _TrackedText(text)
        tracked.budget, tracked.paid = self, paid
        return tracked

    def pay_for(self, *values: Any) -> None:
        """Takes the weight of each value."""
        for value in values:
            self.pay(self.weight(value))

    def weight(self, value: Any) -> int:
        """The weight of a value."""
        return self.weight_and_depth(value)[0]

    def weight_and_depth(self, value: Any) -> tuple[int, int]:
        """The weight of a value, and how many levels of containers it has."""
        return self._measure(value)[:2]

    def _measure(self, value: Any) -> tuple[int, int, int]:
        """The weight of a value, its levels of containers, and how many containers it has apart from texts.

        It works level by level, without recursion, and stops at values that are heavier than the budget.
        """
        weight, depth, containers = 0, 0, 0
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
                        containers += 1
                        inner.extend(each)
            level = inner
        return weight, depth, containers

    def _too_large(self) -> NoReturn:
        raise ChatTemplateError(
            f"the chat template was stopped: it makes more text or lists than {self._size:,} characters and "
            f"elements, which is the limit for these messages"
        )


class _TrackedText(str):
    """A text that gives back what was paid for it when it is no longer in use."""

    budget: Budget
    paid: int

    def __del__(self) -> None:
        self.budget.refund(self.paid)
