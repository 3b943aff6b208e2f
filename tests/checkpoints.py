"""Small checkpoints of any family, written by transformers, with weights that make every error visible."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
NULL = object()  # stands for the value null in changes of config.json, where None removes a key


@dataclass(frozen=True)
class Variant:
    """One checkpoint of the grid: a config for transformers, and changes of the files that it writes.

    Attributes:
        name: of the variant.
        config: the config for transformers, with model_type.
        dtype: of the tensors in the files.
        shards: max_shard_size, such as "20KB".
        spell: changes of config.json; None removes a key.
        disguise: the same for changes with which transformers cannot read the config.
        tensors: renames, removes or adds tensors in the file.
        strays: safetensors files that no index names, with wrong weights.
        length: tokens that are compared with match_transformers.
        faulty: transformers does not do what the config asks for, by a fault that tests/parity/mended.py
            corrects.
        refused: our error, where we refuse what transformers ignores.
    """

    name: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shards: str | None = None
    spell: dict[str, Any] = field(default_factory=dict)
    disguise: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] | None = None
    strays: tuple[str, ...] = ()
    length: int = 600
    faulty: bool = False
    refused: str | None = None

    def __str__(self) -> str:
        return self.name


def make(folder: Path, variant: Variant, seed: int = 0) -> Path:
    """Writes the checkpoint of a variant, config.json and safetensors, into `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(variant.config)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.to(variant.dtype).save_pretrained(folder, max_shard_size=variant.shards or "1GB")
    if variant.tensors is not None:
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        save_file(variant.tensors(tensors), path)
    if variant.spell:
        respell(folder, variant.spell)
    for stray in variant.strays:
        save_file({name: weight.neg() for name, weight in model.state_dict().items()}, folder / stray)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def respell(folder: Path, changes: dict[str, Any]) -> None:
    """Changes keys of config.json. None removes a key, NULL sets it to null."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name, None)
        if value is not None:
            values[name] = None if value is NULL else value
    path.write_text(json.dumps(values))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Large random weights, also for norms and biases, so that every wrong reading changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(
                    noise * (0.3 if "emb" in name or "wte" in name else 1.5 / parameter.shape[1] ** 0.5)
                )
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
