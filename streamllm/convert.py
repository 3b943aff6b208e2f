"""convert(): any checkpoint that can be loaded -> safetensors in Hugging Face layout, as transformers reads
it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch

from streamllm.load import PROGRESS_FROM, open_source
from streamllm.tokenizer import TOKENIZER_FILES
from streamllm.weights.checkpoint import DTYPES, FLOATS, INDEX, SINGLE, Checkpoint, Job, Reader, Stored
from streamllm.weights.config_reader import read_json
from streamllm.weights.family import Family

# What is copied as it is, where it is there.
COPIED = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "chat_template.jinja",
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
    """Writes the checkpoint `name`, a hub name or a folder, into the new folder `out`, and returns that.

    Weights go into model.safetensors, or into shards of at most `max_shard_size` (bytes, or "5GB", "500MB")
    with an index; config.json, generation_config.json and the tokenizer's files go beside them. Tensors keep
    their type on disk, or are cast to `dtype`. Names, fused matrices and shapes stay as the family has them;
    what nobody reads (stored rotary tables) is left out. `allow_pickle`: read pytorch_model.bin, which could
    run code.

    One tensor is in memory at a time. `out` appears when all of it is written.

    Raises CheckpointError as `load` does, and ValueError for an `out` that is there already or a wrong size
    or type.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already, and not empty: give a new folder")
    limit = _bytes(max_shard_size)
    wanted = _wanted(dtype)
    source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
    checkpoint = Checkpoint(source, allow_pickle=allow_pickle)
    jobs, config, _ = checkpoint.plan()
    entries = [_entry(checkpoint.family, job, wanted) for job in jobs]
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for relative in COPIED:
            found = source.find(relative)
            if found is not None:
                shutil.copyfile(found, made / relative)
        values = checkpoint.family.respell(read_json(source.file("config.json")))
        values.pop("auto_map", None)  # names of code, which is not copied
        if wanted:
            values.pop("torch_dtype", None)
            values["dtype"] = next(text for text, known in DTYPES.items() if known == FLOATS[wanted])
        if checkpoint.config.tied and not config.tied:
            values["tie_word_embeddings"] = False  # as the files are
        (made / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with _progress(sum(entry.nbytes for entry in entries), source.name) as report:
            _write_shards(made, entries, limit, report)
        made.chmod(0o755)
        os.replace(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return target


@dataclass(frozen=True)
class _Entry:
    """One tensor to write."""

    name: str
    stored: Stored
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored.shape) * FLOATS[self.dtype].itemsize


def _entry(family: Family, job: Job, wanted: str | None) -> _Entry:
    stored, ours, _ = job
    return _Entry(_name_on_disk(family, stored.name, ours), stored, wanted or stored.dtype)


def _name_on_disk(family: Family, found: str, ours: tuple[str, ...]) -> str:
    """The full name: files of a base model lack the prefix, and a tied head may stand in for its
    embedding."""
    if ours == ("embed.weight",):
        return next(theirs for theirs, known in family.tensors.items() if known == "embed.weight")
    return family.full_name(found) or found


def _write_shards(folder: Path, entries: list[_Entry], limit: int, report: Callable[[int], object]) -> None:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0], report)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, shard, report)
        places |= {entry.name: file for entry in shard}
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, entries: Iterable[_Entry], report: Callable[[int], object]) -> None:
    """One safetensors file, tensor by tensor. (safetensors' own writer wants them all at once.)"""
    entries = sorted(
        entries, key=lambda entry: (-FLOATS[entry.dtype].itemsize, entry.name)
    )  # all aligned, so
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
    reader = Reader()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_tensor(file, entry, reader)
            report(entry.nbytes)


def _write_tensor(file: BinaryIO, entry: _Entry, reader: Reader) -> None:
    tensor = reader.read(entry.stored, keep=False).to(FLOATS[entry.dtype]).contiguous()
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _progress(total: int, name: str) -> Iterator[Callable[[int], object]]:
    """A bar on standard error for what takes a while."""
    if total < PROGRESS_FROM:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=f"converting {name}") as bar:
        yield bar.update


def _wanted(dtype: torch.dtype | str | None) -> str | None:
    """safetensors' name for a type; None for None and "auto"."""
    if dtype is None or dtype == "auto":
        return None
    for name, known in FLOATS.items():
        if known == (DTYPES.get(dtype) if isinstance(dtype, str) else dtype):
            return name
    raise ValueError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}, or None to keep each tensor's")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(size).upper())
    number = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= number < 2**63:
        raise ValueError(
            f'max_shard_size is {size!r}; supported: a number of bytes, or text like "5GB", "500MB"'
        )
    return int(number)


@click.command("convert")
@click.argument("name", metavar="NAME|FOLDER")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag, commit or refs/pr/N of a hub repository.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Bytes of one file, such as 500MB.")
@click.option(
    "--dtype", default="auto", show_default=True, help="float32, bfloat16, …; auto keeps each tensor's."
)
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin, which could run code.")
def convert_command(
    name: str, out: Path, revision: str | None, max_shard_size: str, dtype: str, allow_pickle: bool
) -> None:
    """Write a checkpoint as safetensors in Hugging Face layout.

    NAME is a hub name or a folder, OUT a new folder, which transformers and streamllm load alike.
    """
    made = convert(
        name, out, revision=revision, max_shard_size=max_shard_size, dtype=dtype, allow_pickle=allow_pickle
    )
    for path in sorted(made.iterdir()):
        click.echo(f"{path.stat().st_size:>15,}  {path}")
