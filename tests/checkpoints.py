"""Small checkpoints of any family, made by transformers with weights loud enough to show a wrong reading."""

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
NULL = object()  # in `spell`: a key whose value is null


@dataclass(frozen=True)
class Variant:
    """One checkpoint of the grid: a config for transformers, and what is done to the files afterwards."""

    name: str
    config: dict[str, Any]  # with model_type; given to transformers as it is
    dtype: torch.dtype = torch.float32  # on disk
    shards: str | None = None  # max_shard_size, "20KB"
    spell: dict[str, Any] = field(default_factory=dict)  # laid over config.json; None removes a key
    disguise: dict[str, Any] = field(default_factory=dict)  # as `spell`, where transformers cannot read it
    tensors: Callable[[Tensors], Tensors] | None = None  # renames, drops or adds tensors on disk
    strays: tuple[str, ...] = ()  # safetensors that nobody names, whose weights are wrong
    length: int = 600  # tokens compared under match_transformers
    faulty: bool = False  # transformers does not do what the config says, by a fault that can be mended
    refused: str | None = None  # what we say instead of doing what the config says

    def __str__(self) -> str:
        return self.name


def make(folder: Path, variant: Variant, seed: int = 0) -> Path:
    """Write the checkpoint of a variant into `folder`: config.json and safetensors, as its owner would."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(variant.config)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(config)
    shout(model, seed)
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
    """Lay `changes` over config.json; None removes a key, NULL sets it to null."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name, None)
        if value is not None:
            values[name] = None if value is NULL else value
    path.write_text(json.dumps(values))


def shout(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights that no wrong reading can hide behind: norms and biases random, too."""
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
