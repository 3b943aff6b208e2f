"""Checkpoint: reads the config, lists the tensors, and loads the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamllm.models.linear import Linear, format_for, is_copied, linears_to_arrange
from streamllm.weights.catalogue import FAMILIES
from streamllm.weights.checkpoint.part import Part, cut
from streamllm.weights.checkpoint.placement import (
    LoadJob,
    check_complete,
    check_shape,
    find_jobs,
    find_parameters,
    settle_tie,
)
from streamllm.weights.checkpoint.reader import TensorReader
from streamllm.weights.checkpoint.shards import list_tensors
from streamllm.weights.checkpoint.spelling import Spelling, attach, spelling_of
from streamllm.weights.checkpoint.stored import DTYPES, SAFETENSORS_DTYPES, StoredTensor
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig, list_names
from streamllm.weights.family import Family
from streamllm.weights.files import read_json
from streamllm.weights.source import Source

# Smaller tensors are copied: the kernel maps many pages around the one that a small tensor lies on.
MIN_MAPPED_BYTES = 1 << 16


class LoadPlan(NamedTuple):
    """What is read for which parameters of which model."""

    jobs: list[LoadJob]
    config: Any  # differs from config.json's if that ties a head that the files hold apart
    model: nn.Module  # on the meta device


class Checkpoint:
    """A checkpoint. Making one reads the config; the weights are read later, when they are needed.

    Attributes:
        source: the files.
        config_reader: config.json, and which of its keys were read.
        family: how checkpoints of this model_type are read.
        config: the model's Config.

    Raises:
        CheckpointNotFound: a file is missing.
        UnsupportedConfig: the model_type, a value of the config or the format is not supported. Weights in a
            pickle are supported only with `allow_pickle`.
        CheckpointError: the files are damaged.
    """

    def __init__(self, source: Source, match_transformers: bool = False, allow_pickle: bool = False) -> None:
        self.source = source
        self._allow_pickle = allow_pickle
        self.config_reader = ConfigReader(read_json(_config_file(source)), f"config.json of {source.name}")
        self.family, self.config = read_config(self.config_reader, match_transformers)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by their names in the files. Weights on the hub are downloaded for it."""
        return list_tensors(self.source, self._allow_pickle)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in the files."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def dtype(self, wanted: torch.dtype | str = "auto") -> torch.dtype:
        """The type to load in. "auto" is the config's type, or else that of the first tensor.

        Raises ValueError for a type other than float64, float32, float16 and bfloat16.
        """
        if isinstance(wanted, torch.dtype) and wanted in DTYPES.values():
            return wanted
        if isinstance(wanted, str) and wanted in DTYPES:
            return DTYPES[wanted]
        if wanted != "auto":
            raise ValueError(f"dtype is {wanted!r}; supported: auto, {', '.join(DTYPES)}")
        old_spelling = self.config_reader.choice("torch_dtype", "", DTYPES)
        named = self.config_reader.choice("dtype", old_spelling, DTYPES)
        if named:
            return DTYPES[named]
        known = (stored.dtype for stored in self.tensors.values() if stored.dtype in SAFETENSORS_DTYPES)
        return SAFETENSORS_DTYPES[next(known, "F32")]

    def build(self, config: Any = None) -> nn.Module:
        """The model on the meta device, without weights. `config` replaces that of the files."""
        config = self.config if config is None else config
        try:
            with torch.device("meta"):
                return self.family.model(config)
        except (RuntimeError, OverflowError) as error:  # sizes are multiplied on the meta device, too
            reason = str(error).splitlines()[0]
            raise UnsupportedConfig(
                f"{self.config_reader.where}: no model can have its sizes ({reason})"
            ) from None

    def plan(self) -> LoadPlan:
        """What is read for which parameters. All tensors exist and have the shapes that the config asks for."""
        name = self.source.name
        if self.config.layers > len(self.tensors):
            raise CheckpointError(
                f"{self.config_reader.where} says {self.config.layers} layers, but the files hold only "
                f"{len(self.tensors)} tensors"
            )
        jobs = find_jobs(name, self.family, self.tensors.values())
        jobs, config = settle_tie(name, jobs, self.config)
        model = self.build(config)
        check_complete(name, find_parameters(model), jobs)
        return LoadPlan(jobs, config, model)

    def spelling(self, jobs: list[LoadJob], config: Any) -> Spelling:
        """How the files of a plan spell the model."""
        found = self.source.find("generation_config.json")
        generation = None if found is None else read_json(found)
        untied = self.config.tied and not config.tied
        return spelling_of(self.family, self.config_reader.values, generation, jobs, untied)

    def load(
        self,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        report: Callable[[int], object] | None = None,
        part: Part | None = None,
        quantize: str | None = None,
    ) -> nn.Module:
        """The model with its weights, in `dtype` on `device`, ready for inference.

        The model is built on the meta device and filled tensor by tensor. A tensor that needs no change stays
        mapped to its file; one that is cast, split or moved is read and released. `report` is called with the
        bytes of each tensor that is done. `part`: build and read only this part of the model. `quantize`: the
        type that weights of linear layers are rounded to, one by one: only one is in memory unrounded.
        """
        dtype, device = self.dtype(dtype), torch.device(device)
        jobs, config, model = self.plan()
        if part is not None:
            model = part.build(self.build, config)
        else:
            attach(model, self.spelling(jobs, config))
        parameters = find_parameters(model)
        arranged = [] if quantize else linears_to_arrange(model, dtype, device)
        linears = {id(linear.weight): linear for linear in arranged}
        reader = TensorReader()
        not_finite: set[str] = set()
        for stored, names, split in jobs:
            targets = [parameters[name] for name in names]
            slices = [None if part is None else part.slice(name) for name in names]
            to_lay_out = [linears[id(target.meta)] for target in targets if id(target.meta) in linears]
            slots = [slot for target in targets for slot in target.slots if slot.attribute == "weight"]
            users = [slot.module for slot in slots] if quantize else []
            to_round = [module for module in users if isinstance(module, Linear)]
            # A mapped tensor keeps its whole map in memory, so a tensor that is copied must not be mapped.
            is_copy = split is not None or any(slices) or stored.nbytes < MIN_MAPPED_BYTES
            stays = not is_copy and SAFETENSORS_DTYPES[stored.dtype] == dtype and device.type == "cpu"
            stays = stays and not any(is_copied(linear.weight, dtype) for linear in to_lay_out)
            stays = stays and (not to_round or len(to_round) < len(users))
            whole = reader.read(stored, keep=stays)
            if any(slices):
                tensors = cut(whole, split, config, slices)
            else:
                tensors = [whole] if split is None else list(split(whole, config))
            del whole
            for name, target in zip(names, targets, strict=True):
                tensor = tensors.pop(0)
                check_shape(self.source.name, stored, name, tuple(tensor.shape), tuple(target.meta.shape))
                linear = linears.get(id(target.meta))
                laid_out = linear is not None and is_copied(linear.weight, dtype)  # another copy, below
                tensor = _converted(tensor, dtype, device, is_copy and not laid_out)
                if not _is_finite(tensor):
                    not_finite.add(stored.name)
                target.assign(tensor)
                del tensor
            for linear in to_lay_out:
                linear.arrange()  # one by one, so that only one weight is in memory twice
            for linear in to_round:
                linear.quantize(format_for(model, linear, str(quantize)))
            if report is not None:
                report(stored.nbytes)
        if not_finite:
            warnings.warn(
                f"{self.source.name}: values that are not finite in {list_names(sorted(not_finite))}; the "
                f"model's output is likely to be meaningless",
                stacklevel=2,
            )
        return model.eval()


def read_config(config: ConfigReader, match_transformers: bool = False) -> tuple[Family, Any]:
    """The family of a config.json, and the model's Config. Raises UnsupportedConfig."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise config.wrong("model_type", model_type, ", ".join(sorted(FAMILIES)))
    if config.get("quantization_config") is not None:
        raise UnsupportedConfig(
            f"{config.where}: quantization_config is set, and quantised checkpoints are not supported; load "
            f"the original checkpoint instead"
        )
    family = FAMILIES[model_type]
    return family, family.read(config, match_transformers)


def _config_file(source: Source) -> Path:
    found = source.find("config.json")
    if found is not None:
        return found
    if source.find("adapter_config.json") is not None:
        raise UnsupportedConfig(f"{source.name} holds only an adapter; merge it into its base model first")
    raise CheckpointNotFound(f"{source.name} has no config.json, so it is not a Hugging Face checkpoint")


def _converted(part: Tensor, dtype: torch.dtype, device: torch.device, is_copy: bool) -> Tensor:
    """A tensor in another type, on another device, contiguous and aligned."""
    part = part.to(device=device, dtype=dtype, copy=is_copy).contiguous()
    # Some writers do not align tensors, and some kernels cannot read such tensors.
    return part.clone() if part.data_ptr() % part.element_size() else part


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The extremes show it in one pass, without a mask of the same size."""
    low, high = torch.aminmax(tensor.cpu() if tensor.device.type == "mps" else tensor)
    return bool(low.isfinite() and high.isfinite())
