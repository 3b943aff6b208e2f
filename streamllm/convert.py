"""convert(): any checkpoint that loads -> safetensors in the layout that transformers reads."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from streamllm.loading import open_source, weights_progress
from streamllm.tokenizer import TOKENIZER_FILES, list_template_files
from streamllm.weights.checkpoint import (
    DTYPES,
    INDEX,
    SAFETENSORS_DTYPES,
    SINGLE,
    Checkpoint,
    LoadJob,
    StoredTensor,
    TensorReader,
)
from streamllm.weights.checkpoint.placement import EMBEDDING
from streamllm.weights.family import Family
from streamllm.weights.files import MIN_START_BYTES, check_not_pointer, read_json

# Files that are copied unchanged if they exist.
COPIED_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


def convert(
    name: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    allow_pickle: bool = False,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """Writes a checkpoint as safetensors into a new folder, and returns the folder.

    Names, fused matrices and shapes stay as the family has them. Tensors that the model does not use (stored
    rotary tables) are left out. config.json, generation_config.json and the tokenizer's files are written
    too. One tensor is in memory at a time. The folder appears when all of it is written.

    Args:
        name: a hub name or a folder.
        out: the new folder.
        revision: a branch, tag, commit or "refs/pr/1" of a hub repository.
        max_shard_size: bytes of one file, or text such as "5GB" or "500MB". Larger weights are written as
            several files with an index.
        dtype: cast all tensors to this type; None or "auto" keeps each tensor's type.
        allow_pickle: read pytorch_model.bin, which could run code.
        local_files_only: download nothing.
        token: a hub token.

    Raises:
        CheckpointError: as `load` does.
        ValueError: `out` exists already, or a wrong `max_shard_size` or `dtype`.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already and is not empty: give a new folder")
    max_bytes = _parse_bytes(max_shard_size)
    new_dtype = _safetensors_name(dtype)
    source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
    checkpoint = Checkpoint(source, allow_pickle=allow_pickle)
    plan = checkpoint.plan()
    entries = [_entry(checkpoint.family, job, new_dtype) for job in plan.jobs]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for relative in dict.fromkeys((*COPIED_FILES, *list_template_files(source))):
            found = source.find(relative)
            if found is not None:
                with found.open("rb") as file:
                    check_not_pointer(found, file.read(MIN_START_BYTES))
                (unfinished / relative).parent.mkdir(exist_ok=True)
                shutil.copyfile(found, unfinished / relative)
        values = checkpoint.family.respell(read_json(source.file("config.json")))
        values.pop("auto_map", None)  # names of Python code, which is not copied
        if new_dtype:
            values.pop("torch_dtype", None)
            values["dtype"] = _name(SAFETENSORS_DTYPES[new_dtype])
        if checkpoint.config.tied and not plan.config.tied:
            values["tie_word_embeddings"] = False  # the files hold a head of their own
        (unfinished / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with weights_progress(sum(entry.nbytes for entry in entries), f"converting {source.name}") as report:
            _write_shards(unfinished, entries, max_bytes, report)
        unfinished.chmod(0o755)
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


@dataclass(frozen=True)
class _Entry:
    """A tensor to write."""

    name: str
    stored: StoredTensor
    dtype: str  # as safetensors names it

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize


def _entry(family: Family, job: LoadJob, new_dtype: str | None) -> _Entry:
    """A tensor under its full name. Files of a base model lack the prefix of names.

    A tied head may be stored in place of the embedding; it is written under the embedding's name.
    """
    if job.parameters == EMBEDDING:
        name = next(theirs for theirs, ours in family.tensors.items() if (ours,) == EMBEDDING)
    else:
        name = family.full_name(job.stored.name) or job.stored.name
    return _Entry(name, job.stored, new_dtype or job.stored.dtype)


def _write_shards(
    folder: Path, entries: list[_Entry], max_bytes: int, report: Callable[[int], object]
) -> None:
    shards: list[list[_Entry]] = [[]]
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


def _write_file(path: Path, entries: Iterable[_Entry], report: Callable[[int], object]) -> None:
    """A safetensors file, tensor by tensor. (The writer of the safetensors library needs all in memory.)"""
    # With the largest types first, every tensor is aligned to its type.
    entries = sorted(entries, key=lambda entry: (-SAFETENSORS_DTYPES[entry.dtype].itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        offsets = [start, start + entry.nbytes]
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.stored.shape),
            "data_offsets": offsets,
        }
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    reader = TensorReader()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_tensor(file, entry, reader)
            report(entry.nbytes)


def _write_tensor(file: BinaryIO, entry: _Entry, reader: TensorReader) -> None:
    tensor = reader.read(entry.stored, keep=False).to(SAFETENSORS_DTYPES[entry.dtype]).contiguous()
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _safetensors_name(dtype: torch.dtype | str | None) -> str | None:
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


def _name(dtype: torch.dtype) -> str:
    """The name of a type in config.json."""
    return next(name for name, known in DTYPES.items() if known == dtype)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _parse_bytes(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(size).upper())
    number = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= number < 2**63:
        raise ValueError(
            f'max_shard_size is {size!r}; supported: a number of bytes, or text like "5GB", "500MB"'
        )
    return int(number)
