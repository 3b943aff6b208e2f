"""The file of a session: safetensors with metadata, a checksum, and what must agree with the model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from streamllm.models.quantized import format_of
from streamllm.models.step import geometry_of
from streamllm.session.tensor_file import TensorFile, raw_bytes, write_tensors
from streamllm.tokenizer import Tokenizer
from streamllm.weights.errors import shorten

FORMAT = "streamllm session"
VERSION = 1
PARTIAL = ".partial"  # ends the name of a file that is being written
LEFT_AFTER = 3600  # seconds; an older partial file was left by a process that ended
SAMPLES = 16  # values of each tensor in the fingerprint
TOLERANCE = 0.02  # relative; a value in bfloat16 is off by at most 0.004, twice rounded by 0.008
TOKENS = 512  # of a vocabulary in the fingerprint


class SessionError(ValueError):
    """A file that is no session, or damaged, or that belongs to another model."""


def write(path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file, or leave the old one as it is: any error or crash leaves one of the two, whole.

    Raises OSError where the folder cannot be written, or the disk is full.
    """
    text = json.dumps(state, ensure_ascii=False)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "state": text,
        "checksum": checksum(text, on_cpu),
    }
    try:
        _write_whole(path, lambda file: write_tensors(file, metadata, on_cpu))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"the session was not saved, and the file stays as it was: {reason}", str(path)
        ) from error
    _sync_folder(path.parent)


def _write_whole(path: Path, write_to: Callable[[BinaryIO], None]) -> None:
    """Write beside `path`, and rename."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they saved to `path` have left beside it."""
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(PARTIAL):
                with suppress(OSError):
                    if time.time() - entry.stat().st_mtime > LEFT_AFTER:
                        os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Make a renamed file survive a power cut. Not all systems can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote. Raises SessionError for a damaged file and for one of another kind or version."""
    try:
        file = TensorFile(path)
        metadata = file.metadata
        kind, version = metadata["format"], metadata["version"]
    except (ValueError, KeyError):
        raise SessionError(f"{path} is not a saved session, or it is damaged") from None
    if kind != FORMAT:
        raise SessionError(f"{path} is not a saved session, but a file of the format {shorten(repr(kind))}")
    if version != str(VERSION):
        raise SessionError(
            f"{path} was saved in version {shorten(str(version))} of the format, and this version of streamllm reads "
            f"{VERSION}: load it with the version that saved it"
        )
    try:
        tensors = file.tensors()
        text = metadata["state"]
        whole = metadata["checksum"] == checksum(text, tensors)
        state = json.loads(text) if whole else None
    except (ValueError, KeyError, TypeError):
        whole, state = False, None
    if not whole or not isinstance(state, dict):
        raise SessionError(f"{path} is damaged: its checksum is wrong, so nothing of it can be used")
    return state, tensors


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the state and of every tensor, with its name, type and shape."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def fingerprint(model: nn.Module, tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies a model and its tokenizer, whatever the type and device of the weights."""
    geometry = geometry_of(model)
    inner: nn.Module = getattr(model, "model", model) if "compiled" in type(model).__module__ else model
    sizes = {
        name: getattr(geometry, name) for name in ("kv_heads", "head_dim", "vocab_size", "trained_length")
    }
    return {
        "model": f"{type(inner).__module__}.{type(inner).__name__}",
        "geometry": {**sizes, "windows": list(geometry.windows)},
        "config": _config(inner),
        "weights": _samples(inner),
        "tokenizer": _tokenizer_digest(tokenizer),
    }


def check_fingerprint(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises SessionError that says what differs."""
    for name, what in (("model", "class"), ("geometry", "sizes"), ("config", "config")):
        theirs, here = saved.get(name), own[name]
        if theirs == here:
            continue
        if isinstance(theirs, dict) and isinstance(here, dict):
            key = next(key for key in sorted({*theirs, *here}) if theirs.get(key) != here.get(key))
            theirs, here, what = theirs.get(key), here.get(key), key
        raise SessionError(
            f"{path} belongs to another model: its {what} is {shorten(repr(theirs))}, here {shorten(repr(here))}"
        )
    theirs, here = saved.get("weights", {}), own["weights"]
    for name in sorted({*theirs, *here}):
        if not _agree(theirs.get(name), here.get(name)):
            raise SessionError(
                f"{path} belongs to other weights: those of {name} differ; load the checkpoint and revision that "
                f"the session was saved with"
            )
    if saved.get("tokenizer") != own["tokenizer"]:
        raise SessionError(f"{path} belongs to another tokenizer: the tokens of its vocabulary differ")


def _agree(theirs: Any, here: Any) -> bool:
    """Whether two samples may be of the same weights: each value may be rounded, by one step at most."""
    if theirs is None or here is None or theirs["shape"] != here["shape"]:
        return False
    allowed = TOLERANCE * max(map(abs, [*theirs["values"], *here["values"], 1e-30]))
    none = [0.0] * len(here["values"])
    steps = map(max, theirs.get("steps", none), here.get("steps", none))
    return all(
        abs(a - b) <= allowed + step
        for a, b, step in zip(theirs["values"], here["values"], steps, strict=True)
    )


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return {name: json.loads(json.dumps(value, default=str)) for name, value in values.items()}


def _samples(model: nn.Module) -> dict[str, Any]:
    """The shape and some values of each weight [out, in], whatever its layout; of a rounded one also the steps."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            full = f"{name}.{own}" if name else own
            found[full] = _sample(weight.detach(), getattr(module, "scale", None))
    return found


def _sample(weight: Tensor, scale: Tensor | None) -> dict[str, Any]:
    format = format_of(weight)
    if weight.is_mkldnn:
        weight = weight.to_dense()
    shape = weight.shape if format is None else torch.Size(format.shape(weight))
    count = shape.numel()
    numbers = np.array([count * step // SAMPLES for step in range(min(count, SAMPLES))], np.int64)
    places = np.unravel_index(numbers, shape)  # torch's imports sympy, which takes 37 MB
    if format is None or scale is None:
        values = weight[tuple(torch.from_numpy(axis).to(weight.device) for axis in places)].double().tolist()
        return {"shape": list(shape), "values": [_short(value) for value in values]}
    sampled = [format.sample(weight, scale, *map(int, place)) for place in zip(*places, strict=True)]
    return {
        "shape": list(shape),
        "values": [_short(value) for value, _ in sampled],
        "steps": [_short(step) for _, step in sampled],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    size = tokenizer.vocab_size
    tokens = [tokenizer.id_to_token(size * step // TOKENS) for step in range(TOKENS)]
    text = json.dumps([size, tokens, tokenizer.special_tokens], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
