"""ConfigReader: config.json read key by key, each value checked at the door, each key remembered as read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streamllm.weights.errors import CheckpointError, UnsupportedConfig

# Bytes, and brackets of both kinds: the index of a model with a hundred thousand tensors has 10 MB and four
# brackets. A value of two bytes can take sixty in memory, so that a file of small ones is refused unparsed.
LARGEST_JSON = 32 << 20
MOST_BRACKETS = 100_000
DEEPEST = 2048  # layers; a model is built before its weights are read, at about a millisecond for each
LARGEST_NUMBER = 1 << 31  # of a size in a config; beyond it a product would overflow somewhere


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is none, or not to be read."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(
                f"{path.name} has {path.stat().st_size} bytes, too many for a JSON file of a model"
            )
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_BRACKETS:
            raise CheckpointError(f"{path} holds more lists and objects than a JSON file of a model has")
        value = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}; download the file again") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path} is not valid JSON: {reason}; download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {_shown(value)}; download the file again")
    return value


class ConfigReader:
    """A mapping from config.json that knows where it came from and which of its keys were asked for.

    Every getter takes the value that an absent key stands for. `null` counts as absent, but for `has` and
    the getters that are told otherwise. Raises UnsupportedConfig, naming key and value, for a wrong type.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self.where = where
        self.read: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the key is there, `null` included."""
        return name in self._values

    def get(self, name: str) -> Any:
        self.read.add(name)
        return self._values.get(name)

    def size(self, name: str, default: int, least: int = 1) -> int:
        """A whole number, from `least` on."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST_NUMBER:
            raise self.wrong(name, value, f"a whole number from {least} on")
        return value

    def depth(self, name: str, default: int) -> int:
        """A number of layers."""
        value = self.size(name, default)
        if value > DEEPEST:
            raise self.wrong(name, value, f"a whole number from 1 to {DEEPEST}")
        return value

    def number(self, name: str, default: float, least: float = -math.inf) -> float:
        value = self.get(name)
        if value is None:
            return default
        # Compared with the largest float, because there are whole numbers beyond it.
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not max(least, -sys.float_info.max) <= value <= sys.float_info.max:
            raise self.wrong(
                name, value, "a finite number" if least == -math.inf else f"a number from {least} on"
            )
        return float(value)  # torch takes no whole number beyond 2^63

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, default: str, allowed: Iterable[str]) -> str:
        value = self.get(name)
        allowed = sorted(allowed)
        if value is None:
            return default
        if value not in allowed:
            raise self.wrong(name, value, f"one of {', '.join(allowed)}")
        return str(value)

    def inner(self, name: str) -> ConfigReader | None:
        """The object under a key; None where it is absent or empty."""
        value = self.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return ConfigReader(value, f"{name} in {self.where}")

    def wrong(self, name: str, value: object, allowed: str) -> UnsupportedConfig:
        """The error for a value that is not among what is allowed."""
        return UnsupportedConfig(f"{self.where}: {name} is {_shown(value)}; supported: {allowed}")

    def unread(self) -> list[str]:
        """The keys that nothing asked for: they have no effect."""
        return sorted(set(self._values) - self.read)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
