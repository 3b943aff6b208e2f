"""Family: what this library must know to load one family of checkpoints, as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamllm.weights.config_reader import ConfigReader


@dataclass(frozen=True)
class Fused:
    """A tensor on disk that holds several of ours: rows of `names` in an order that `split` knows."""

    names: tuple[str, ...]
    split: Callable[[Tensor, Any], tuple[Tensor, ...]]  # (fused [rows, ...], config) -> one for each name


NOT_NEEDED = ""  # a tensor that some files carry and nobody reads, such as stored rotary tables

Target = str | Fused  # the name in our model, several of them, or NOT_NEEDED


@dataclass(frozen=True)
class Family:
    """One architecture's outside: how its config is read and how its tensors are called on disk.

    In `tensors`, `{}` stands for a layer's number on both sides. A file of the base model alone lacks
    `prefix` in front of its names.
    """

    read: Callable[[ConfigReader, bool], Any]  # (config, match_transformers) -> the model's Config
    model: Callable[[Any], nn.Module]
    tensors: Mapping[str, Target]
    prefix: str
    respell: Callable[[dict[str, Any]], dict[str, Any]] = dict  # config.json as it is spelled today

    def target(self, name: str) -> tuple[Target, str] | None:
        """What a tensor on disk is for us, and its layer's number; None for a name that we do not know."""
        full = self.full_name(name)
        if full is None:
            return None
        pattern, layer = _pattern(full)
        return self.tensors[pattern], layer

    def full_name(self, name: str) -> str | None:
        """A tensor's name as files of the whole model have it; None for a name that we do not know."""
        for candidate in (name, self.prefix + name):
            if _pattern(candidate)[0] in self.tensors:
                return candidate
        return None


_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})\.")


def _pattern(name: str) -> tuple[str, str]:
    """model.layers.12.mlp.weight -> model.layers.{}.mlp.weight and 12."""
    found = _NUMBER.search(name)
    if found is None:
        return name, ""
    return name[: found.start()] + ".{}." + name[found.end() :], found[1]


def with_bias(names: Mapping[str, str]) -> dict[str, Target]:
    """The rows of a table for modules, each with its weight and its bias."""
    return {
        f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")
    }


def fused_qkv(name: str, split: Callable[[Tensor, Any], tuple[Tensor, ...]]) -> dict[str, Target]:
    """The rows of a table for a module that holds a layer's q, k and v, with weight and bias."""
    return {
        f"{name}.{part}": Fused(tuple(f"layers.{{}}.attention.{ours}.{part}" for ours in "qkv"), split)
        for part in ("weight", "bias")
    }
