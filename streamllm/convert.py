"""convert(): any checkpoint that loads -> safetensors in the layout that transformers reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from streamllm.loading import open_source, weights_progress
from streamllm.shard_files import (
    Entry,
    check_new,
    dtype_name,
    new_folder,
    parse_bytes,
    safetensors_name,
    write_shards,
)  # fmt: skip
from streamllm.tokenizer import COMPANION_FILES, TOKENIZER_FILES, list_template_files
from streamllm.weights.checkpoint import SAFETENSORS_DTYPES, Checkpoint, LoadJob, TensorReader
from streamllm.weights.checkpoint.spelling import full_name
from streamllm.weights.family import Family
from streamllm.weights.files import MIN_START_BYTES, check_not_pointer

# Files that are copied unchanged if they exist.
COPIED_FILES = (*TOKENIZER_FILES, *COMPANION_FILES, "generation_config.json")


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
    check_new(target)
    max_bytes = parse_bytes(max_shard_size)
    new_dtype = safetensors_name(dtype)
    source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
    checkpoint = Checkpoint(source, allow_pickle=allow_pickle)
    plan, reader = checkpoint.plan(), TensorReader()
    entries = [_entry(checkpoint.family, job, new_dtype, reader) for job in plan.jobs]
    with new_folder(target) as unfinished:
        for relative in dict.fromkeys((*COPIED_FILES, *list_template_files(source))):
            found = source.find(relative)
            if found is not None:
                with found.open("rb") as file:
                    check_not_pointer(found, file.read(MIN_START_BYTES))
                (unfinished / relative).parent.mkdir(exist_ok=True)
                shutil.copyfile(found, unfinished / relative)
        values = dict(checkpoint.spelling(plan.jobs, plan.config).values)
        if new_dtype:
            values.pop("torch_dtype", None)
            values["dtype"] = dtype_name(SAFETENSORS_DTYPES[new_dtype])
        (unfinished / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with weights_progress(sum(entry.nbytes for entry in entries), f"converting {source.name}") as report:
            write_shards(unfinished, entries, max_bytes, report)
    return target


def _entry(family: Family, job: LoadJob, new_dtype: str | None, reader: TensorReader) -> Entry:
    stored = job.stored
    return Entry(
        full_name(family, job),
        stored.shape,
        new_dtype or stored.dtype,
        lambda: reader.read(stored, keep=False),
    )
