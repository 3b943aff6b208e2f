"""Describing a checkpoint without reading its weights."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from streamllm.cache import SinkCache
from streamllm.loading import QUANTIZED_DTYPE, check_quantize
from streamllm.models import linear
from streamllm.models.alibi import Alibi
from streamllm.models.quantized import FORMATS, INT4, INT8, has_whole_groups
from streamllm.models.rotary import Rope
from streamllm.models.step import Geometry
from streamllm.tensor_parallel import Share, list_numbers
from streamllm.tokenizer import TOKENIZER_FILES, TokenizerError, load_tokenizer_files
from streamllm.weights.checkpoint import DTYPES, INDEX, PICKLE, PICKLE_INDEX, SINGLE, Checkpoint
from streamllm.weights.files import read_json

KEYS_USED_OUTSIDE_MODEL = ("eos_token_id",)  # keys of config.json that the model itself does not read


def describe(
    checkpoint: Checkpoint,
    sinks: int = 4,
    window: int | None = None,
    dtype: torch.dtype | str = "auto",
    processes: int = 1,
    quantize: str | None = None,
) -> Iterator[tuple[str, str]]:
    """Lines about a checkpoint, as (name, value). A line that continues the one before has the name "".

    processes: how many hold the model together; lines say what each holds. quantize: as for `load`.

    Raises ValueError for an unknown dtype or `quantize`, for sinks or a window out of range and where the model
    cannot be divided among so many processes; CheckpointError for a broken index.
    """
    source, config = checkpoint.source, checkpoint.config
    check_quantize(quantize)
    files, dtypes = _files(checkpoint)
    chosen, why = _dtype(checkpoint, dtype, dtypes)
    if quantize and dtype == "auto":
        chosen, why = QUANTIZED_DTYPE, "the default with rounded weights"
    model = checkpoint.build().to(chosen)
    geometry: Any = model.geometry
    assert isinstance(geometry, Geometry)
    count = sum(parameter.numel() for parameter in model.parameters())

    commit = getattr(source, "commit", None)
    yield "name", source.name if commit is None else f"{source.name} at {commit}"
    yield (
        "architecture",
        f"{checkpoint.config_reader.get('model_type')}: {config.layers} layers, width {config.width:,}, "
        f"MLP {config.mlp_width:,}, vocabulary {config.vocab_size:,}",
    )
    yield "", f"the head {'is the embedding (tied)' if config.tied else 'has its own weights (not tied)'}"
    yield (
        "parameters",
        f"{count:,}: {_bytes(_nbytes(model, chosen, quantize))} in {_types(chosen, quantize)} ({why})",
    )
    yield (
        "heads",
        f"{config.heads} for queries, {geometry.kv_heads} for keys and values, of {geometry.head_dim} dimensions",
    )
    yield from _positions(config, geometry.head_dim)
    trained = geometry.trained_length
    yield (
        "trained for",
        "any length: its positions have no limit" if trained is None else f"{trained:,} tokens",
    )
    own = [window for window in geometry.windows if window is not None]
    if own:
        sizes = ", ".join(f"{size:,}" for size in sorted(set(own)))
        yield "window", f"sliding, {sizes} tokens, in {len(own)} of {len(geometry.windows)} layers"
    yield from (("files" if i == 0 else "", line) for i, line in enumerate(files))
    yield from _tokenizer(checkpoint)

    token = sum(2 * geometry.kv_heads * geometry.head_dim * chosen.itemsize for _ in geometry.windows)
    cache = SinkCache(model, sinks=sinks, window=window)
    yield "cache", f"{token:,} bytes per token in {_name(chosen)}"
    yield (
        "",
        f"{sinks} sinks and {cache.window:,} recent tokens: {_bytes(cache.nbytes)}, however long the stream",
    )
    if processes > 1:
        yield from _shares(checkpoint, sinks, cache.window, chosen, processes, quantize)
    for key in KEYS_USED_OUTSIDE_MODEL:
        checkpoint.config_reader.get(key)
    yield "no effect", ", ".join(checkpoint.config_reader.unread()) or "every key of config.json has one"


def _shares(
    checkpoint: Checkpoint, sinks: int, window: int, dtype: torch.dtype, processes: int, quantize: str | None
) -> Iterator[tuple[str, str]]:
    """What each process of a tensor-parallel job holds. Processes that hold equally much share a line."""
    ranks_by_line: dict[str, list[int]] = {}
    for rank in range(processes):
        share = Share(checkpoint.config, rank, processes)
        model = share.build(checkpoint.build, checkpoint.config).to(dtype)
        count = sum(parameter.numel() for parameter in model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cache of the whole model has warned
            cache = SinkCache(model, sinks=sinks, window=window)
        line = (
            f"heads: {len(share.heads)} for queries, {len(share.kv_heads)} for keys and values; parameters: "
            f"{count:,}, {_bytes(_nbytes(model, dtype, quantize))}; cache: {_bytes(cache.nbytes)}"
        )
        ranks_by_line.setdefault(line, []).append(rank)
    for number, (line, ranks) in enumerate(ranks_by_line.items()):
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {list_numbers(ranks, 'and')}"
        yield "divided" if number == 0 else "", f"{which}: {line}"


def _nbytes(model: nn.Module, dtype: torch.dtype, quantize: str | None) -> int:
    """Bytes of the parameters of a model, which has no values yet, with Linear weights rounded."""
    if quantize is None:
        return sum(value.numel() for value in model.parameters()) * dtype.itemsize
    total = 0
    for module in model.modules():
        is_rounded = isinstance(module, linear.Linear)
        own = module.named_parameters(recurse=False)
        total += sum(
            value.numel() * dtype.itemsize for name, value in own if not (is_rounded and name == "weight")
        )
        if isinstance(module, linear.Linear):
            format = FORMATS[linear.format_for(model, module, quantize)]
            if format is INT4 and not has_whole_groups(module.in_features):
                format = INT8
            total += format.nbytes(module.out_features, module.in_features, dtype.itemsize)
    return total


def _types(dtype: torch.dtype, quantize: str | None) -> str:
    return _name(dtype) if quantize is None else f"{quantize}, the rest in {_name(dtype)}"


def _positions(config: Any, head_dim: int) -> Iterator[tuple[str, str]]:
    """The encoding of positions, with the numbers that the checkpoint uses."""
    for number in dataclasses.fields(config):
        value = getattr(config, number.name)
        if isinstance(value, Rope):
            kind = type(value).__name__.removesuffix("Rope").lower()
            rotated = "all" if value.dim == head_dim else f"{value.dim} of {head_dim}"
            yield (
                "positions",
                f"rotary{f', {kind}' if kind else ''}: theta {value.theta:,g}, {rotated} dimensions rotated",
            )
            shared = {field.name for field in dataclasses.fields(Rope)}
            rest = [field.name for field in dataclasses.fields(value) if field.name not in shared]
            rest += ["attention_factor"] if value.attention_factor != 1 else []
            if rest:
                yield "", ", ".join(f"{name} {_number(getattr(value, name))}" for name in rest)
        elif isinstance(value, Alibi):
            slopes = value.slopes()
            yield "positions", f"ALiBi: slopes from {slopes.max():g} to {slopes.min():g}"


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} numbers in {min(value):g} … {max(value):g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """A line for each file, with its size; and the types of the tensors, where the files are local."""
    source = checkpoint.source
    names: list[str] = []
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if source.has(single):
            names = [single]
        elif source.has(index):
            weight_map = read_json(source.file(index)).get("weight_map")
            if isinstance(weight_map, dict):
                names = sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
        if names:
            break
    if not names:
        return ["no weights here"], []
    sizes = {name: source.size(name) for name in names}
    missing = [name for name, size in sizes.items() if size is None]
    whole = sum(size or 0 for size in sizes.values())
    lines = [f"{name}  {_bytes(size)}" for name, size in sizes.items() if size is not None]
    if len(lines) > 6:
        lines = [*lines[:2], f"… {len(lines) - 4} more", *lines[-2:]]
    if len(names) > 1:
        lines.append(f"{len(names)} files, {_bytes(whole)}")
    lines += [f"{name}  MISSING" for name in missing]
    tokenizers = [name for name in TOKENIZER_FILES[:2] if source.has(name)]
    lines.append(tokenizers[0] if tokenizers else "no tokenizer")
    dtypes: list[str] = []
    if getattr(source, "commit", None) is None and not missing and names[0].endswith(".safetensors"):
        dtypes = sorted({stored.dtype for stored in checkpoint.tensors.values()})
        lines[-1:-1] = [f"{len(checkpoint.tensors)} tensors of {', '.join(dtypes)}"]
    return lines, dtypes


def _tokenizer(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The tokenizer of a folder: its size, and the tokens that it puts around a text."""
    source = checkpoint.source
    if getattr(source, "commit", None) is not None or not any(map(source.has, TOKENIZER_FILES[:2])):
        return
    try:
        tokenizer = load_tokenizer_files(source.file("config.json").parent)
    except TokenizerError as error:
        yield "tokenizer", f"cannot be loaded: {error}"
        return
    added = [
        name for name, is_added in (("BOS", tokenizer.adds_bos), ("EOS", tokenizer.adds_eos)) if is_added
    ]
    around = " and ".join(added) if added else "neither BOS nor EOS"
    yield "tokenizer", f"{tokenizer.vocab_size:,} ids; it adds {around} to a text"
    for flag in tokenizer.ignored_flags:
        name = "adds_bos" if flag == "add_bos_token" else "adds_eos"
        yield (
            "",
            f"{flag} of tokenizer_config.json has no effect, as in transformers 5; transformers 4 adds the token "
            f"for some classes: tokenizer.{name} = True",
        )


def _dtype(checkpoint: Checkpoint, wanted: torch.dtype | str, stored: list[str]) -> tuple[torch.dtype, str]:
    """The type that sizes are computed for, and where it comes from. Unknown types count as float32."""
    named = any(checkpoint.config_reader.get(key) is not None for key in ("dtype", "torch_dtype"))
    if wanted == "auto" and not named and not stored:
        return torch.float32, "the config names no dtype"
    if wanted == "auto":
        return checkpoint.dtype(), "as the config says" if named else "as stored"
    return checkpoint.dtype(wanted), "as asked for"


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
