"""Which module and tensor of transformers, or on disk, belongs to which module here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from streamllm.weights.checkpoint import Checkpoint, StoredTensor
from streamllm.weights.family import NOT_NEEDED, Fused


def compared_modules(checkpoint: Checkpoint) -> list[str]:
    """Our modules whose outputs are compared, in the order of the forward. The head is compared by the logits."""
    return ["embed", *(f"layers.{n}" for n in range(checkpoint.config.layers)), "norm"]


def names_in_transformers(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Names of our modules -> names of the same modules in transformers' `model`.

    They follow from the names of tensors on both sides: model.layers.{}.self_attn.q_proj.weight is our
    layers.{}.attention.q.weight, so model.layers.{}.self_attn.q_proj is layers.{}.attention.q, then
    model.layers.{}.self_attn is layers.{}.attention, and so on.
    """
    theirs = dict(model.named_modules())
    patterns: dict[str, list[str]] = {}
    for their_tensor, target in checkpoint.family.tensors.items():
        if target == NOT_NEEDED:
            continue
        for our_tensor in target.names if isinstance(target, Fused) else (target,):
            ours, twin = our_tensor, their_tensor
            while "." in ours and "." in twin:
                ours, twin = ours.rpartition(".")[0], twin.rpartition(".")[0]
                patterns.setdefault(ours, []).append(twin)
    names: dict[str, str] = {}
    for ours, twins in patterns.items():
        for layer in map(str, range(checkpoint.config.layers if "{}" in ours else 1)):
            for twin in twins:
                found = twin.replace("{}", layer)
                if found in theirs and ("{}" in ours) == ("{}" in twin):
                    names.setdefault(ours.replace("{}", layer), found)
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_name = next((name for name, module in theirs.items() if module is head), None)
    return names if head_name is None else {**names, "head": head_name}


def fused_parts(checkpoint: Checkpoint) -> dict[str, tuple[Fused, int]]:
    """Our modules that transformers keeps in one fused module: the fused tensor, and which part they are."""
    found = {}
    for target in checkpoint.family.tensors.values():
        if isinstance(target, Fused):
            for index, name in enumerate(target.names):
                for layer in range(checkpoint.config.layers):
                    found[name.rpartition(".")[0].replace("{}", str(layer))] = (target, index)
    return found


def part_of_output(output: Tensor, part: tuple[Fused, int] | None, config: Any) -> Tensor:
    """The expected output of our module, from the output [1, T, rows] of transformers' module."""
    if part is None:
        return output
    fused, index = part
    return fused.split(output[0].T.contiguous(), config)[index].T[None]


def stored_tensors(checkpoint: Checkpoint, modules: Sequence[str]) -> tuple[StoredTensor, ...]:
    """The tensors on disk that our modules are read from."""
    wanted = {*modules, *(["embed"] if "head" in modules and checkpoint.config.tied else [])}
    found = []
    for stored in checkpoint.tensors.values():
        target, layer = checkpoint.family.target(stored.name) or (NOT_NEEDED, "")
        names = target.names if isinstance(target, Fused) else (target,)
        if any(name.rpartition(".")[0].replace("{}", layer) in wanted for name in names):
            found.append(stored)
    return tuple(found)
