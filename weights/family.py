"""Family: how the checkpoints of one architecture are read, as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamllm.weights.config_reader import ConfigReader


@dataclass(frozen=True)
class Fused:
    """A tensor on disk that holds several parameters of ours."""

    names: tuple[str, ...]
    split: Callable[[Tensor, Any], tuple[Tensor, ...]]  # (fused [rows, ...], config) -> one for each name


NOT_NEEDED = ""  # a tensor that some files hold and the model does not use, such as stored rotary tables

Target = str | Fused  # the name in our model, or the names of a fused tensor, or NOT_NEEDED


@dataclass(frozen=True)
class Family:
    """How the config of an architecture is read, and what its tensors are called on disk.

    Attributes:
        read: (config.json, match_transformers) -> the model's Config.
        model: Config -> the model.
        tensors: names on disk -> names in our model. `{}` stands for the number of a layer on both sides.
        prefix: what the names lack in files of the base model alone.
        respell: an old config.json -> the same with the names of today.
    """

    read: Callable[[ConfigReader, bool], Any]
    model: Callable[[Any], nn.Module]
    tensors: Mapping[str, Target]
    prefix: str
    respell: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def target(self, name: str) -> tuple[Target, str] | None:
        """What a tensor on disk fills, and the number of its layer; None for an unknown name."""
        full = self.full_name(name)
        if full is None:
            return None
        pattern, layer = _pattern(full)
        return self.tensors[pattern], layer

    def full_name(self, name: str) -> str | None:
        """A tensor's name as files of the whole model have it; None for an unknown name."""
        for candidate in (name, self.prefix + name):
            if _pattern(candidate)[0] in self.tensors:
                return candidate
        return None


_LAYER_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})\.")


def _pattern(name: str) -> tuple[str, str]:
    """model.layers.12.mlp.weight -> model.layers.{}.mlp.weight and 12."""
    found = _LAYER_NUMBER.search(name)
    if found is None:
        return name, ""
    return name[: found.start()] + ".{}." + name[found.end() :], found[1]


def with_bias(names: Mapping[str, str]) -> dict[str, Target]:
    """Rows of a table of tensors: the weight and the bias of each module in `names`."""
    return {
        f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")
    }


def fused_qkv(name: str, split: Callable[[Tensor, Any], tuple[Tensor, ...]]) -> dict[str, Target]:
    """Rows of a table of tensors: the weight and the bias of a module that holds q, k and v of a layer."""
    return {
        f"{name}.{part}": Fused(tuple(f"layers.{{}}.attention.{ours}.{part}" for ours in "qkv"), split)
        for part in ("weight", "bias")
    }
