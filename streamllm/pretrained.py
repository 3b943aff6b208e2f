"""save_pretrained(): a loaded model, trained or merged -> a checkpoint that transformers and `load` read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import Tensor, nn

from streamllm.compiled import Compiled
from streamllm.loading import weights_progress
from streamllm.shard_files import (
    Entry,
    check_new,
    dtype_name,
    new_folder,
    parse_bytes,
    safetensors_name,
    write_shards,
)
from streamllm.tokenizer import Tokenizer, files_of
from streamllm.weights.checkpoint.spelling import Split, attached, join, written_tensors


def save_pretrained(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a model and its tokenizer as safetensors into a new folder, and returns the folder.

    The files spell the model as the checkpoint did from which `load` or `load_model` made it: names, fused matrices
    and config.json, with the type that the weights have now. The tokenizer's files and generation_config.json are
    copied from that checkpoint. The folder appears when all of it is written.

    Args:
        model: what `load` or `load_model` returned, perhaps trained or compiled since then; adapters must be merged.
        tokenizer: what `load` or `load_tokenizer` returned; None writes no tokenizer.
        folder: the new folder.
        max_shard_size: as for `convert`.

    Raises:
        ValueError: `folder` is not empty; the model was not loaded from a checkpoint, is quantised, is one process'
            part of a tensor-parallel model, or has adapters; the tokenizer's files are gone; a wrong
            `max_shard_size`.
    """
    target = Path(folder)
    check_new(target)
    max_bytes = parse_bytes(max_shard_size)
    if isinstance(model, Compiled):
        model = model.model
    spelling = attached(model)
    if spelling is None:
        raise ValueError(
            "save_pretrained writes a whole model that load() or load_model() made from a checkpoint: this one was "
            "made in another way, or is one process' part of a model; save its state_dict()"
        )
    entries = [
        _entry(name, parameters, split, getattr(model, "config", None))
        for name, parameters, split in written_tensors(model, spelling)
    ]
    copied = {} if tokenizer is None else files_of(tokenizer)
    values = {name: value for name, value in spelling.values.items() if name not in ("torch_dtype", "dtype")}
    values["dtype"] = dtype_name(next(model.parameters()).dtype)
    with new_folder(target) as unfinished:
        for name, path in copied.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, unfinished / name)
        for name, content in {"config.json": values, "generation_config.json": spelling.generation}.items():
            if content is not None:
                (unfinished / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with weights_progress(sum(entry.nbytes for entry in entries), f"writing {target.name}") as report:
            write_shards(unfinished, entries, max_bytes, report)
    return target


def _entry(name: str, parameters: list[Tensor], split: Split | None, config: object) -> Entry:
    dtype = safetensors_name(parameters[0].dtype)
    assert dtype is not None
    if split is None:
        return Entry(name, tuple(parameters[0].shape), dtype, lambda: parameters[0])
    shape = (sum(parameter.shape[0] for parameter in parameters), *parameters[0].shape[1:])
    return Entry(
        name, shape, dtype, lambda: join([part.detach().cpu() for part in parameters], split, config)
    )
