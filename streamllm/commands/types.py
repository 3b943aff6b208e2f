"""The types of option values: what is allowed, before anything slow is imported."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import click

DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
)  # streamllm.weights.checkpoint.DTYPES, which imports torch
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))  # with very many, the OpenMP library ends the process
MAX_TOKENS = 2**48  # far beyond any memory; larger numbers do not fit into a tensor's size
LEAST_TEMPERATURE = 1e-6  # with a smaller one, float32 logits divided by it are not finite


class CountParamType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A whole number of at least `minimum`. The help names no upper limit: `most` only keeps numbers in 64 bits."""

    name = "n"

    def __init__(self, minimum: int, most: int = MAX_TOKENS) -> None:
        self.minimum, self.most = minimum, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if number < self.minimum:
            self.fail(f"{number} is too small: give {self.minimum} or more", param, ctx)
        if number > self.most:
            self.fail(f"{number} is too large: give at most {self.most:,}", param, ctx)
        return number


class SeedParamType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A whole number of at most 64 bits, with or without a sign."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            seed = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if not -(2**63) <= seed < 2**64:
            self.fail(f"seed must be a whole number of at most 64 bits, not {value}", param, ctx)
        return seed


class ForeverParamType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A number of tokens, or "forever"."""

    name = "N|forever"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "forever":
            return "forever"
        try:
            number = int(value)
        except ValueError:
            number = -1
        if not 0 <= number <= MAX_TOKENS:
            self.fail(f"{value!r} is neither a number of tokens nor 'forever'", param, ctx)
        return number


class NumbersParamType(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, none below `minimum`, with commas between them."""

    name = "N,N,…"

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not self.minimum <= min(numbers) <= max(numbers) <= MAX_TOKENS:
            self.fail(
                f"{value!r} is not a list of numbers of at least {self.minimum}, like 4 or 0,4,8", param, ctx
            )
        return numbers


class ChoicesParamType(click.ParamType):  # type: ignore[type-arg]
    """Some of several names, with commas between them, or "all"."""

    name = "NAME,NAME,…"  # in the usage of a command

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        chosen = self.allowed if value == "all" else tuple(dict.fromkeys(str(value).split(",")))
        if unknown := [name for name in chosen if name not in self.allowed]:
            self.fail(f"{unknown[0]!r} is not one of {', '.join(self.allowed)}, all", param, ctx)
        return chosen


class NumberParamType(click.FloatRange):
    """A finite number in a range. click's own type lets NaN pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class TemperatureParamType(click.ParamType):  # type: ignore[type-arg]
    """0, or a number that float32 logits can be divided by."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if number != 0 and not LEAST_TEMPERATURE <= number < math.inf:
            allowed = f"0 (greedy) or a number from {LEAST_TEMPERATURE:g}"
            self.fail(f"temperature must be {allowed}, not {value}", param, ctx)
        return number


class DeviceParamType(click.ParamType):  # type: ignore[type-arg]
    """The name of a device. Only torch knows which devices work here: see `streamllm.loading.usable_device`."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"(cpu|cuda|mps|xpu|hpu|npu|mtia|privateuseone)(:[0-9]{1,4})?", str(value)):
            self.fail(f"{value!r} is not the name of a device: give cpu, cuda, cuda:1 or mps", param, ctx)
        return str(value)


class DtypeParamType(click.ParamType):  # type: ignore[type-arg]
    """The name of a type of weights."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value != "auto" and value not in DTYPES:
            # Not `fail`: the sentence is that of `streamllm.load`, without the usage of the command.
            raise ValueError(f"dtype is {value!r}; supported: auto, {', '.join(DTYPES)}")
        return str(value)


class OutputFileParamType(click.Path):
    """A file that will be written at the end. Whether that is possible is asked before the computation."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if path.exists():
            return path
        folder = path.absolute().parent
        if not folder.is_dir():
            self.fail(f"there is no folder {str(folder)!r} to write {path.name!r} into", param, ctx)
        try:
            # A permission does not say it all: the file system may be full, read-only or virtual.
            with tempfile.NamedTemporaryFile(prefix=".streamllm-", dir=folder):
                pass
        except OSError as error:
            self.fail(f"no file can be written into the folder {str(folder)!r}: {error.strerror}", param, ctx)
        return path
