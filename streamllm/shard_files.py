"""Writing tensors as safetensors files, one tensor in memory at a time, as many files as a maximum size asks for."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO

import torch
from torch import Tensor

from streamllm.weights.checkpoint import DTYPES, INDEX, SAFETENSORS_DTYPES, SINGLE


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    read: Callable[[], Tensor]  # its values, in any type

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize


def check_new(out: Path) -> None:
    """Raise ValueError where `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty: give a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, or is deleted after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_shards(folder: Path, entries: list[Entry], max_bytes: int, report: Callable[[int], object]) -> None:
    """Write the tensors into one file, or into several with an index. `report` is called with the bytes written."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], report)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard, report)
        weight_map |= {entry.name: file for entry in shard}
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: Iterable[Entry], report: Callable[[int], object]) -> None:
    """A safetensors file, tensor by tensor. (The writer of the safetensors library needs all in memory.)"""
    # With the largest types first, every tensor is aligned to its type.
    entries = sorted(entries, key=lambda entry: (-SAFETENSORS_DTYPES[entry.dtype].itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        offsets = [start, start + entry.nbytes]
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_tensor(file, entry)
            report(entry.nbytes)


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    tensor = entry.read().detach().to("cpu", SAFETENSORS_DTYPES[entry.dtype]).contiguous()
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def safetensors_name(dtype: torch.dtype | str | None) -> str | None:
    """The name of a type in safetensors files; None for None and "auto"."""
    if dtype is None or dtype == "auto":
        return None
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    for name, known in SAFETENSORS_DTYPES.items():
        if known == wanted:
            return name
    raise ValueError(
        f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}, or None to keep the type of each tensor"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type in config.json."""
    return next(name for name, known in DTYPES.items() if known == dtype)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str) -> int:
    """Bytes of `max_shard_size`: a number, or text such as "5GB". Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(size).upper())
    number = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= number < 2**63:
        raise ValueError(
            f'max_shard_size is {size!r}; supported: a number of bytes, or text like "5GB", "500MB"'
        )
    return int(number)
