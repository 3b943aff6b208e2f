"""Which tensor of the files fills which parameters of the model, and the checks that all are filled."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamllm.weights.checkpoint.reader import TensorReader
from streamllm.weights.checkpoint.stored import SAFETENSORS_DTYPES, StoredTensor
from streamllm.weights.errors import CheckpointError, UnsupportedConfig, list_names
from streamllm.weights.family import NOT_NEEDED, Family, Fused

# The last part of the names of tensors in quantised files: GPTQ and AWQ, MLX, bitsandbytes, compressed-tensors, FP8.
QUANTISED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".scales",
    ".biases",
    ".SCB",
    ".weight_format",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".input_scale",
    ".weight_shape",
)

HEAD, EMBEDDING = ("head.weight",), ("embed.weight",)


class LoadJob(NamedTuple):
    """A tensor to read, and the parameters that it fills."""

    stored: StoredTensor
    parameters: tuple[str, ...]  # names in our model; several for a fused tensor
    split: (
        Callable[[Tensor, Any], tuple[Tensor, ...]] | None
    )  # of a fused tensor: one part for each parameter


def find_jobs(name: str, family: Family, tensors: Iterable[StoredTensor]) -> list[LoadJob]:
    """A job for each tensor that the model needs. `name` is the checkpoint's, for messages.

    Raises CheckpointError for tensors that the family does not know, UnsupportedConfig for quantised ones.
    """
    jobs: list[LoadJob] = []
    unknown: list[str] = []
    for stored in tensors:
        found = family.target(stored.name)
        if found is None:
            unknown.append(stored.name)
            continue
        target, layer = found
        if target == NOT_NEEDED:
            continue
        if stored.dtype not in SAFETENSORS_DTYPES:
            raise UnsupportedConfig(
                f"{name}: {stored.name} is stored as {stored.dtype}; supported: "
                f"{', '.join(SAFETENSORS_DTYPES)} (quantised checkpoints are not supported)"
            )
        if isinstance(target, Fused):
            parameters = tuple(ours.replace("{}", layer) for ours in target.names)
            jobs.append(LoadJob(stored, parameters, target.split))
        else:
            jobs.append(LoadJob(stored, (target.replace("{}", layer),), None))
    quantised = [each for each in unknown if each.endswith(QUANTISED_SUFFIXES)]
    if quantised:
        raise UnsupportedConfig(
            f"{name}: {list_names(quantised)} belong to a quantised checkpoint, and quantised checkpoints are not "
            f"supported; load the original checkpoint instead"
        )
    if unknown:
        raise CheckpointError(
            f"{name}: the model has no place for {list_names(unknown)}; is model_type in config.json correct?"
        )
    return jobs


def settle_tie(name: str, jobs: list[LoadJob], config: Any) -> tuple[list[LoadJob], Any]:
    """Jobs and config if the config ties the head to the embedding.

    The files may hold only the embedding, only the head, or both with equal values. If they hold two different
    tensors, the head is not tied, as in transformers.
    """
    by_parameters = {job.parameters: job.stored for job in jobs}
    head, embedding = by_parameters.get(HEAD), by_parameters.get(EMBEDDING)
    if not config.tied or head is None:
        return jobs, config
    if embedding is None:  # some writers keep only the alphabetically first of two names
        return [job._replace(parameters=EMBEDDING) if job.parameters == HEAD else job for job in jobs], config
    if head.shape == embedding.shape and torch.equal(_read(head), _read(embedding)):
        return [job for job in jobs if job.parameters != HEAD], config
    warnings.warn(
        f"{name}: the config ties the head to the embedding, but the files have another head, which is used",
        stacklevel=4,
    )
    return jobs, dataclasses.replace(config, tied=False)


def _read(stored: StoredTensor) -> Tensor:
    return TensorReader().read(stored, keep=False)


class Slot(NamedTuple):
    """An attribute of a module that holds a parameter."""

    module: nn.Module
    attribute: str


class Parameter(NamedTuple):
    """A parameter of the model, and all places where it is used: several if modules share it."""

    meta: nn.Parameter  # on the meta device
    slots: list[Slot]

    def assign(self, tensor: Tensor) -> None:
        """Puts the values into the model."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, attribute in self.slots:
            setattr(module, attribute, parameter)


def find_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The parameters of a model by the first of their names."""
    first_names: dict[int, str] = {}
    parameters: dict[str, Parameter] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first_names.setdefault(id(parameter), f"{path}.{attribute}" if path else attribute)
            parameters.setdefault(name, Parameter(parameter, [])).slots.append(Slot(module, attribute))
    return parameters


def check_complete(name: str, parameters: Mapping[str, Parameter], jobs: list[LoadJob]) -> None:
    """Raises CheckpointError unless the jobs fill each parameter once, in its shape."""
    filled = [ours for job in jobs for ours in job.parameters]
    theirs = {ours: job.stored.name for job in jobs for ours in job.parameters}
    missing = [ours for ours in parameters if ours not in theirs]
    if missing:
        raise CheckpointError(
            f"{name}: the files lack the weights of {list_names(missing)}; download them again"
        )
    extra = [theirs[ours] for ours in filled if ours not in parameters]
    if extra:
        raise CheckpointError(f"{name}: a model of this config has no place for {list_names(extra)}")
    if len(filled) != len(theirs):
        twice = sorted({ours for ours in filled if filled.count(ours) > 1})
        raise CheckpointError(f"{name}: the files have {list_names(twice)} twice, under two names")
    for stored, ours, split in jobs:
        shape = tuple(parameters[ours[0]].meta.shape)
        if split is None:
            check_shape(name, stored, ours[0], stored.shape, shape)
        else:
            rows = sum(parameters[each].meta.shape[0] for each in ours)
            check_shape(name, stored, stored.name, stored.shape, (rows, *shape[1:]))


def check_shape(
    name: str, stored: StoredTensor, ours: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Raises CheckpointError, with the shape of the whole tensor in the file, if the two differ."""
    if found != wanted:
        raise CheckpointError(
            f"{name}: {stored.name} has the shape {list(stored.shape)}, but by the config {ours} must have "
            f"{list(wanted)}"
        )
