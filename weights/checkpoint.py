"""A checkpoint's files -> a model: config, index, shards, completeness, and each tensor to its place."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from streamllm.models.linear import is_copied, linears_to_arrange
from streamllm.weights import FAMILIES, pickled
from streamllm.weights.config_reader import ConfigReader, read_json
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig
from streamllm.weights.family import NOT_NEEDED, Family, Fused

LARGEST_HEADER = (
    25_000_000  # bytes of a safetensors file's header, as on the hub; in memory it is ten times that
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"

# As safetensors names them. Anything else, integers and 8-bit floats, is some quantised format.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Source(Protocol):
    """Where the files come from: a folder, or one commit of a repository (weights/resolve.py)."""

    @property
    def name(self) -> str: ...
    @property
    def offline(self) -> bool: ...  # nothing can be fetched: what is not found may be there all the same
    def file(self, relative: str) -> Path: ...
    def find(self, relative: str) -> Path | None: ...
    def has(self, relative: str) -> bool: ...
    def size(self, relative: str) -> int | None: ...


@dataclass(frozen=True)
class Stored:
    """One tensor on disk, not read yet."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name for it
    pickled: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk; 0 for a type that is not loaded."""
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 0

    def read(self) -> Tensor:
        """The tensor, mapped from its file: pages are read when touched, and go when the tensor goes."""
        return Reader().read(self, keep=False)


# Bytes that may be read through one mapping before it is replaced by a new one.
MAPPED = 64 << 20
# A tensor of fewer bytes is copied: the page it lies on is mapped with many around it.
SMALL = 1 << 16


class Reader:
    """Reads tensors of safetensors files, and lets go of the pages that were read.

    A tensor is a part of its file's mapping, and the pages touched through a mapping stay in memory as long
    as any tensor of it lives. So tensors that are kept and tensors that are only copied from have a mapping
    each, and the latter's is dropped from time to time: not after each, because to open a file is to parse
    its header, and there are headers of 100 MB.
    """

    def __init__(self) -> None:
        self._kept: dict[Path, Callable[[str], Tensor]] = {}
        self._passing: tuple[Path, Callable[[str], Tensor]] | None = None
        self._seen = 0  # bytes read through the latter

    def read(self, stored: Stored, keep: bool) -> Tensor:
        """`keep`: the tensor stays as it is, mapped."""
        from safetensors import SafetensorError

        path = stored.path
        try:
            if keep or (stored.pickled and not pickled.is_mapped(path)):  # what is read whole is read once
                if path not in self._kept:
                    self._kept[path] = _open(stored)
                return self._kept[path](stored.name)
            self._seen += stored.nbytes
            if self._passing is None or self._passing[0] != path or self._seen > MAPPED:
                self._passing = None
                self._passing, self._seen = (path, _open(stored)), stored.nbytes
            return self._passing[1](stored.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} has changed while it was read ({_shown(str(error))})") from None


def _open(stored: Stored) -> Callable[[str], Tensor]:
    """The tensors of its file by name, mapped."""
    if stored.pickled:
        return pickled.unpickle(stored.path).__getitem__
    from safetensors import safe_open

    file: Any = safe_open(stored.path, framework="pt", device="cpu")
    return file.get_tensor  # type: ignore[no-any-return]


class Checkpoint:
    """A checkpoint whose config is read and whose tensors are listed, before any weight is.

    Raises CheckpointNotFound for a missing file, UnsupportedConfig for a model_type, a config value or a
    format that this library does not know, CheckpointError for files that are broken. Weights that exist only
    as a pickle are read with `allow_pickle` alone.
    """

    def __init__(self, source: Source, match_transformers: bool = False, allow_pickle: bool = False) -> None:
        self.source = source
        self._allow_pickle = allow_pickle
        self.keys = ConfigReader(read_json(_config_file(source)), f"config.json of {source.name}")
        self.family, self.config = read_config(self.keys, match_transformers)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All tensors on disk, by their name there."""
        index = self.source.find(INDEX)
        if index is not None:
            return _read_shards(self.source, index, list_tensors)
        single = self.source.find(SINGLE)
        if single is not None:
            return {stored.name: stored for stored in list_tensors(single)}
        if self._allow_pickle:
            index = self.source.find(PICKLE_INDEX)
            if index is not None:
                return _read_shards(self.source, index, list_pickled)
            single = self.source.find(PICKLE)
            if single is not None:
                return {stored.name: stored for stored in list_pickled(single)}
        raise self._no_weights()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on disk."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def _no_weights(self) -> CheckpointError:
        if self.source.offline:
            self.source.file(SINGLE)  # is not in the cache, which is all that is known
        for other in (PICKLE, PICKLE_INDEX):
            if self.source.has(other):
                return UnsupportedConfig(
                    f"{self.source.name} has its weights only as {other}, a pickle, which could run code; if "
                    f"you trust its author, load it with allow_pickle=True, or make safetensors of it with "
                    f"'streamllm convert --allow-pickle'"
                )
        return CheckpointNotFound(f"{self.source.name} has no weights: neither {SINGLE} nor {INDEX}")

    def dtype(self, wanted: torch.dtype | str = "auto") -> torch.dtype:
        """The type to load in: the one given, or for "auto" the config's, or else that of the first tensor.

        Raises ValueError for a type that is none of float64, float32, float16 and bfloat16.
        """
        if isinstance(wanted, torch.dtype) and wanted in DTYPES.values():
            return wanted
        if isinstance(wanted, str) and wanted in DTYPES:
            return DTYPES[wanted]
        if wanted != "auto":
            raise ValueError(f"dtype is {wanted!r}; supported: auto, {', '.join(DTYPES)}")
        named = self.keys.choice("dtype", self.keys.choice("torch_dtype", "", ["", *DTYPES]), ["", *DTYPES])
        if named:
            return DTYPES[named]
        return next((FLOATS[stored.dtype] for stored in self.tensors.values() if stored.dtype in FLOATS),
                    torch.float32)  # fmt: skip

    def load(
        self,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        report: Callable[[int], object] | None = None,
    ) -> nn.Module:
        """The model with its weights, in `dtype` on `device`, ready for inference.

        Built on the meta device and filled tensor by tensor: what stays as it is on disk is mapped, what is
        cast, split or moved is read and released. `report` is told the bytes of each tensor that is done.
        """
        dtype, device = self.dtype(dtype), torch.device(device)
        jobs, config, model = self.plan()
        slots = _slots(model)
        doubtful: list[str] = []
        reader = Reader()
        linears = {id(linear.weight): linear for linear in linears_to_arrange(model, dtype, device)}
        for stored, names, split in jobs:
            arranged = [linears[id(slots[name][0][0])] for name in names if id(slots[name][0][0]) in linears]
            same = FLOATS[stored.dtype] == dtype and device.type == "cpu"
            # What stays in a mapping keeps all of it in memory, beside the copies that were made from it.
            copied = split is not None or stored.nbytes < SMALL
            stays = same and not copied and not any(is_copied(linear.weight, dtype) for linear in arranged)
            whole = reader.read(stored, keep=stays)
            parts = (whole,) if split is None else split(whole, config)
            del whole
            for name, part in zip(names, parts, strict=True):
                _check_shape(self.source.name, stored, name, part, slots[name][0][0])
                # A part is copied out of its fused tensor, so that the file's pages can go; so are a few bytes.
                part = part.to(device=device, dtype=dtype, copy=copied).contiguous()
                if not _is_finite(part):
                    doubtful.append(stored.name)
                if part.data_ptr() % part.element_size():
                    part = part.clone()  # some writers do not align, and not every kernel can read that
                _assign(slots[name], part)
                del part
            for linear in arranged:
                linear.arrange()  # one by one: nothing lies in memory twice
            if report is not None:
                report(stored.nbytes)
        if doubtful:
            warnings.warn(
                f"{self.source.name}: values that are not finite in {_list(sorted(set(doubtful)))}; "
                f"what the model says is likely to be nonsense",
                stacklevel=2,
            )
        return model.eval()

    def plan(self) -> tuple[list[Job], Any, nn.Module]:
        """What is to be read for which parameters, the config, and the model on the meta device.

        All tensors are there by then, and have the shapes that the config says. The config is not quite
        config.json's where that ties a head that the files have apart.
        """
        jobs, config = self._jobs()
        model = self.build(config)
        _check_complete(self.source.name, _slots(model), jobs)
        return jobs, config, model

    def build(self, config: Any = None) -> nn.Module:
        """The model on the meta device, without weights; `config` is what the files say, or None."""
        config = self.config if config is None else config
        try:
            with torch.device("meta"):
                return self.family.model(config)
        except (RuntimeError, OverflowError) as error:  # even the meta device multiplies sizes
            reason = str(error).splitlines()[0]
            raise UnsupportedConfig(f"{self.keys.where}: its sizes make no model ({reason})") from None

    def _jobs(self) -> tuple[list[Job], Any]:
        """Each tensor that is needed, with our names for it; and the config, untied where the files are."""
        config = self.config
        if config.layers > len(self.tensors):
            raise CheckpointError(
                f"{self.keys.where} says {config.layers} layers, but there are only "
                f"{len(self.tensors)} tensors"
            )
        jobs: list[Job] = []
        unknown: list[str] = []
        for stored in self.tensors.values():
            found = self.family.target(stored.name)
            if found is None:
                unknown.append(stored.name)
                continue
            target, layer = found
            if target == NOT_NEEDED:
                continue
            if stored.dtype not in FLOATS:
                raise UnsupportedConfig(
                    f"{self.source.name}: {stored.name} is stored as {stored.dtype}; supported: "
                    f"{', '.join(FLOATS)} (quantised checkpoints are not)"
                )
            if isinstance(target, Fused):
                jobs.append((stored, tuple(name.replace("{}", layer) for name in target.names), target.split))
            else:
                jobs.append((stored, (target.replace("{}", layer),), None))
        if unknown:
            raise CheckpointError(
                f"{self.source.name}: the model has no place for {_list(unknown)}; "
                f"is model_type in config.json the right one?"
            )
        return _settle_tie(self.source.name, jobs, config)


Job = tuple[Stored, tuple[str, ...], Callable[[Tensor, Any], tuple[Tensor, ...]] | None]


def read_config(config: ConfigReader, match_transformers: bool = False) -> tuple[Family, Any]:
    """config.json -> its family and the model's Config. Raises UnsupportedConfig, naming what it found."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise config.wrong("model_type", model_type, ", ".join(sorted(FAMILIES)))
    if config.get("quantization_config") is not None:
        raise UnsupportedConfig(
            f"{config.where}: quantization_config is set, and quantised checkpoints are not supported; "
            f"take the original one"
        )
    family = FAMILIES[model_type]
    return family, family.read(config, match_transformers)


def list_tensors(path: Path) -> list[Stored]:
    """The tensors in one safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a pointer of git-lfs, not the file itself; run 'git lfs pull'")
        length = int.from_bytes(start, "little")
        if LARGEST_HEADER < length < path.stat().st_size:
            raise CheckpointError(f"{path} has a header of {length} bytes; up to {LARGEST_HEADER} are read")
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                Stored(name, path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            ]
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({_shown(str(error))}); download it again"
        ) from None


def _config_file(source: Source) -> Path:
    found = source.find("config.json")
    if found is not None:
        return found
    if source.find("adapter_config.json") is not None:
        raise UnsupportedConfig(f"{source.name} holds an adapter only; merge it into its base model first")
    raise CheckpointNotFound(f"{source.name} has no config.json: it is not a Hugging Face checkpoint")


def list_pickled(path: Path) -> list[Stored]:
    """The tensors in one pickle, which is run for that, as weights/pickled.py says."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    return [
        Stored(name, path, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), pickled=True)
        for name, tensor in pickled.unpickle(path).items()
    ]


def _read_shards(
    source: Source, index: Path, list_tensors: Callable[[Path], list[Stored]]
) -> dict[str, Stored]:
    """All tensors of all shards that the index names. The shards' headers count, not the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the file again")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        for stored in list_tensors(source.file(shard)):
            if stored.name in tensors and weight_map.get(stored.name) != shard:
                continue  # in two shards: the index decides
            tensors[stored.name] = stored
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(f"{source.name}: the index promises {_list(lost)}, which no shard has")
    return tensors


def _settle_tie(name: str, jobs: list[Job], config: Any) -> tuple[list[Job], Any]:
    """A tied head may lie in the file, too, as a copy, alone, or in contradiction."""
    if not config.tied:
        return jobs, config
    by_target = {names: stored for stored, names, _ in jobs}
    head, embedding = by_target.get(("head.weight",)), by_target.get(("embed.weight",))
    if head is None:
        return jobs, config
    if embedding is None:  # some writers keep only the name that comes later in the alphabet
        return [(s, ("embed.weight",) if n == ("head.weight",) else n, f) for s, n, f in jobs], config
    if head.shape == embedding.shape and torch.equal(head.read(), embedding.read()):
        return [job for job in jobs if job[1] != ("head.weight",)], config
    warnings.warn(
        f"{name}: the config ties the head to the embedding, but the file has another head, which is used",
        stacklevel=4,
    )
    return jobs, dataclasses.replace(config, tied=False)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are. Their extremes tell, in one pass and without a copy in another type."""
    low, high = torch.aminmax(tensor.cpu() if tensor.device.type == "mps" else tensor)
    return bool(low.isfinite() and high.isfinite())


_Slots = list[tuple[nn.Parameter, nn.Module, str]]


def _slots(model: nn.Module) -> dict[str, _Slots]:
    """Where each parameter lives, by its first name: one place, or more where modules share it."""
    first: dict[int, str] = {}
    slots: dict[str, _Slots] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first.setdefault(id(parameter), f"{path}.{attribute}" if path else attribute)
            slots.setdefault(name, []).append((parameter, module, attribute))
    return slots


def _assign(places: _Slots, tensor: Tensor) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for _, module, attribute in places:
        setattr(module, attribute, parameter)


def _check_complete(name: str, slots: Mapping[str, _Slots], jobs: list[Job]) -> None:
    supplied = [ours for _, names, _ in jobs for ours in names]
    theirs = {ours: stored.name for stored, names, _ in jobs for ours in names}
    missing = [ours for ours in slots if ours not in theirs]
    if missing:
        raise CheckpointError(f"{name}: the files lack the weights of {_list(missing)}; download them again")
    extra = [theirs[ours] for ours in supplied if ours not in slots]
    if extra:
        raise CheckpointError(f"{name}: the config leaves no place for {_list(extra)}")
    if len(supplied) != len(theirs):
        twice = sorted({ours for ours in supplied if supplied.count(ours) > 1})
        raise CheckpointError(f"{name}: the files have {_list(twice)} twice, under two names")
    for stored, names, split in jobs:
        if split is None:
            _check_shape(name, stored, names[0], stored, slots[names[0]][0][0])
        else:
            rows = sum(slots[ours][0][0].shape[0] for ours in names)
            _check_shape(name, stored, stored.name, stored, (rows, *slots[names[0]][0][0].shape[1:]))


def _check_shape(
    name: str, stored: Stored, ours: str, found: Tensor | Stored, wanted: Tensor | tuple[int, ...]
) -> None:
    shape = wanted if isinstance(wanted, tuple) else tuple(wanted.shape)
    if tuple(found.shape) != shape:
        raise CheckpointError(
            f"{name}: {stored.name} has the shape {list(stored.shape)}, but by the config {ours} must have "
            f"{list(shape)}"
        )


def _list(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(_shown(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _shown(name: str) -> str:
    """A name from a file, fit for one line of a terminal."""
    short = name if len(name) <= 120 else name[:117] + "…"
    return short if short.isprintable() else ascii(short)
