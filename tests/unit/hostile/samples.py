"""Ways to damage a tiny checkpoint, and the bounds within which loading it must end."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import streamllm
from streamllm import CheckpointError, TokenizerError
from tests import tiny
from tests.tiny import CONFIG, INDEX, SINGLE

Files = dict[str, Any]  # name -> bytes, or a function that makes something else at that path
SECONDS = 10  # of work for one test
# Memory that loading may take beyond what the process had, in megabytes; and 12 times the size of the files,
# because JSON takes that much in memory.
MEGABYTES = 50

INTACT = tiny.checkpoint()
SHARDED = tiny.checkpoint(shards=3)
SHARDS = sorted(name for name in SHARDED if name.startswith("model-"))
TENSORS = tiny.tensors()
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DEEP, BRACKETS = b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 200_000
NAN = torch.full((16,), float("nan"))
NORM1 = "input_layernorm.weight"
GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
NOT_INTACT = "is not an intact safetensors file"


def peak() -> int:
    """The largest resident memory since the last `reset_peak`, in megabytes."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def reset_peak() -> bool:
    """Whether the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def load_and_run(folder: Path) -> torch.Tensor:
    """Loads a checkpoint, within the limit of memory, and returns the logits after "streams"."""
    is_measured = reset_peak()
    before = peak()
    try:
        model, tokenizer = streamllm.load(folder, device="cpu")
        return model(torch.tensor([tokenizer.encode("streams")]))[0, -1].detach()
    finally:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) >> 20
        assert not is_measured or peak() - before < MEGABYTES + 12 * size


def build(folder: Path, files: Files) -> Path:
    made = {name: value for name, value in files.items() if callable(value)}
    tiny.write(folder, {name: value for name, value in files.items() if isinstance(value, bytes)})
    for name, make in made.items():
        make(folder / name)
    return folder


def check_refused(folder: Path, files: Files, pattern: str) -> None:
    with pytest.raises((CheckpointError, TokenizerError), match=pattern) as caught:
        load_and_run(build(folder, files))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int) -> bytes:
    """The header's entry for a tensor of one float."""
    return b'{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (start, start + 4)


def with_header(**changes: Any) -> bytes:
    """The intact file with another entry for one tensor in its header; None removes a key."""
    data = INTACT[SINGLE]
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for key, value in changes.items():
        header[NORM][key] = value
        if value is None:
            del header[NORM][key]
    return safetensors(header, data[8 + size :])


def with_tensors(changes: dict[str, torch.Tensor | None]) -> Files:
    """The intact checkpoint with other tensors; None removes one."""
    kept = {name: tensor.clone() for name, tensor in (TENSORS | changes).items() if tensor is not None}
    return INTACT | {SINGLE: save(kept)}


def with_config(**changes: Any) -> Files:
    return INTACT | {"config.json": json.dumps(CONFIG | changes).encode()}


def with_index(changes: dict[str, Any] | None = None, **top: Any) -> Files:
    """The checkpoint in shards with another index; None removes a tensor from its map."""
    places = json.loads(SHARDED[INDEX])["weight_map"] | (changes or {})
    places = {name: shard for name, shard in places.items() if shard is not None}
    return SHARDED | {INDEX: json.dumps({"weight_map": places} | top).encode()}


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def without(files: Files, *names: str) -> Files:
    return {name: data for name, data in files.items() if name not in names}


PIECES = without(INTACT, TOKENIZER)  # to be completed with a tokenizer.model
