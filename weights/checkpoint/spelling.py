"""Spelling: how a checkpoint names and stores what a model holds, so that a loaded model can be written likewise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamllm.weights.checkpoint.placement import EMBEDDING, LoadJob
from streamllm.weights.family import Family

Split = Callable[[Tensor, Any], tuple[Tensor, ...]]


class StoredName(NamedTuple):
    """A tensor on disk, and the parameters that it holds."""

    name: str  # as files of the whole model have it
    parameters: tuple[str, ...]
    split: Split | None  # of a fused tensor: one part for each parameter


@dataclass(frozen=True)
class Spelling:
    """config.json with the names of today, generation_config.json if there is one, and every tensor of the files."""

    values: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    names: tuple[StoredName, ...]


def full_name(family: Family, job: LoadJob) -> str:
    """A tensor's name in files of the whole model. Files of a base model lack the prefix of names.

    A tied head may be stored in place of the embedding; its name is then the embedding's.
    """
    if job.parameters == EMBEDDING:
        return next(theirs for theirs, ours in family.tensors.items() if (ours,) == EMBEDDING)
    return family.full_name(job.stored.name) or job.stored.name


def spelling_of(
    family: Family,
    values: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    jobs: Iterable[LoadJob],
    untied: bool,
) -> Spelling:
    """The spelling of a checkpoint. `values` is its config.json; `untied`: the files hold a head that it ties."""
    values = family.respell(dict(values))
    values.pop("auto_map", None)  # names of Python code, which is not copied
    if untied:
        values["tie_word_embeddings"] = False
    names = (StoredName(full_name(family, job), job.parameters, job.split) for job in jobs)
    return Spelling(values, generation, tuple(names))


def attach(model: nn.Module, spelling: Spelling) -> None:
    """Store a checkpoint's spelling on its model."""
    setattr(model, "spelling", spelling)  # noqa: B010  # nn.Module declares tensors and modules only


def attached(model: nn.Module) -> Spelling | None:
    """The spelling of the model's checkpoint; None for a model that was not loaded from one."""
    found = getattr(model, "spelling", None)
    return found if isinstance(found, Spelling) else None


def join(parts: list[Tensor], split: Split, config: Any) -> Tensor:
    """The fused tensor [rows, ...] that `split` divides into these parts.

    Splitting the numbers of the rows tells which row of the fused tensor each row of a part is.
    """
    rows = sum(part.shape[0] for part in parts)
    places = split(torch.arange(rows, dtype=torch.int64, device="cpu").view(rows, 1), config)
    fused = parts[0].new_empty(rows, *parts[0].shape[1:])
    for place, part in zip(places, parts, strict=True):
        fused[place.flatten().to(fused.device)] = part
    return fused


def written_tensors(model: nn.Module, spelling: Spelling) -> Iterator[tuple[str, list[Tensor], Split | None]]:
    """Each tensor to write: its name on disk, the parameters that it holds, and how they are fused.

    Raises ValueError where the model lacks a parameter or holds one in whole numbers.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for stored in spelling.names:
        found: list[Tensor] = []
        for name in stored.parameters:
            parameter = parameters.get(name)
            if parameter is None:
                raise ValueError(
                    f"the model has no parameter {name}: merge adapters first (merge_and_unload of peft), and "
                    f"give the model itself"
                )
            if not parameter.dtype.is_floating_point:
                raise ValueError(
                    f"{name} is quantised to {parameter.dtype}: load the model without quantize to save it"
                )
            found.append(parameter)
        yield stored.name, found, stored.split
