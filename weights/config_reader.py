"""ConfigReader: reads config.json key by key, checks the type of each value, and records which keys were read."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from streamllm.weights.errors import UnsupportedConfig, show

# A model is built on the meta device before its weights are read. That takes time for each layer.
MAX_LAYERS = 2048
MAX_SIZE = (1 << 31) - 1  # of a width, a vocabulary or the like; the product of larger ones would overflow


class ConfigReader:
    """The values of config.json, or of an object in it.

    Each getter takes the default for an absent key. A `null` counts as absent, except in `has`. A getter
    raises UnsupportedConfig, with key and value, where the value has the wrong type or is out of range.

    Attributes:
        where: what an error calls the file, or the object in it.
        read: the names of the keys that were read.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self.where = where
        self.read: set[str] = set()

    @property
    def values(self) -> dict[str, Any]:
        """A copy of all values, which does not count as reading them."""
        return dict(self._values)

    def has(self, name: str) -> bool:
        """Whether the key is present, if only with the value `null`."""
        return name in self._values

    def get(self, name: str) -> Any:
        """The value as it is, unchecked; None for an absent key."""
        self.read.add(name)
        return self._values.get(name)

    def size(self, name: str, default: int, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_SIZE:
            raise self.wrong(name, value, f"a whole number from {least} to {MAX_SIZE}")
        return value

    def depth(self, name: str, default: int) -> int:
        """A number of layers."""
        value = self.size(name, default)
        if value > MAX_LAYERS:
            raise self.wrong(name, value, f"a whole number from 1 to {MAX_LAYERS}")
        return value

    def number(self, name: str, default: float, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number from `least` to `most`."""
        value = self.get(name)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # JSON allows whole numbers beyond the largest float, so the comparison comes before `float()`.
        if not is_number or not max(least, -sys.float_info.max) <= value <= min(most, sys.float_info.max):
            allowed = "a finite number"
            if most < math.inf:
                allowed = f"a number from {least:g} to {most:g}"
            elif least > -math.inf:
                allowed = f"a finite number of at least {least:g}"
            raise self.wrong(name, value, allowed)
        return float(value)  # torch refuses whole numbers of more than 64 bits

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, default: str, allowed: Iterable[str]) -> str:
        """One of the allowed strings."""
        value = self.get(name)
        allowed = sorted(allowed)
        if value is None:
            return default
        if value not in allowed:
            raise self.wrong(name, value, f"one of {', '.join(allowed)}")
        return str(value)

    def inner(self, name: str) -> ConfigReader | None:
        """The object under a key; None where the key is absent or the object is empty."""
        value = self.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return ConfigReader(value, f"{name} in {self.where}")

    def require(self, name: str, what: str) -> None:
        """Raises UnsupportedConfig if the key is absent. `what` needs it, and no value of it can be guessed."""
        if not self.has(name):
            raise UnsupportedConfig(
                f"{self.where} has no {name}, and {what} needs it: add the value that the model was trained with"
            )

    def wrong(self, name: str, value: object, allowed: str) -> UnsupportedConfig:
        """The error for a value that is not supported. The caller raises it."""
        return UnsupportedConfig(f"{self.where}: {name} is {show(value, 80)}; supported: {allowed}")

    def unread(self) -> list[str]:
        """The names of the keys that were not read: they have no effect."""
        return sorted(set(self._values) - self.read)
