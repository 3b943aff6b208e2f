"""Tensors with metadata in one safetensors file, written and read without a second copy in memory.

The safetensors library copies every tensor several times, in the heap of the thread that calls it. Where many threads
save and load, the heap of each keeps that memory (tools/chaos.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from streamllm.malloc import anonymous_memory
from streamllm.weights.checkpoint import SAFETENSORS_DTYPES

DTYPES = {
    **SAFETENSORS_DTYPES,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
LENGTH_BYTES = 8  # the header's length, at the start of the file
ALIGNMENT = 8  # bytes; the header is padded to a multiple of it


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_tensors(file: BinaryIO, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors on the CPU."""
    # With the largest types first, every tensor is aligned to its type.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    start = 0
    for name in names:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]
        }  # fmt: skip
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for name in names:
        file.write(raw_bytes(tensors[name]))


class TensorFile:
    """A file that was read into memory of its own, which goes back to the system with the last of its tensors.

    Raises ValueError where it is not a safetensors file with metadata, OSError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < LENGTH_BYTES:
                raise ValueError("the file is too short")
            self._data = anonymous_memory(size)  # the heap of the thread would keep it
            file.readinto(self._data)
        self._start = LENGTH_BYTES + int.from_bytes(self._data[:LENGTH_BYTES], "little")
        header = json.loads(self._data[LENGTH_BYTES : self._start])
        if not isinstance(header, dict) or not isinstance(header.get(METADATA), dict):
            raise ValueError("the file has no metadata")
        self.metadata: dict[str, Any] = header.pop(METADATA)
        self._header: dict[str, Any] = header

    def tensors(self) -> dict[str, Tensor]:
        """All tensors. They share the file's memory. Raises ValueError, KeyError and TypeError for a damaged header."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self._header.items():
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if not all(isinstance(size, int) and size >= 0 for size in (*shape, start, stop)):
                raise ValueError(f"the sizes of {name} are not whole numbers")
            if stop - start != count * dtype.itemsize or self._start + stop > len(self._data):
                raise ValueError(f"{name} has not the bytes of {shape} in the file")
            tensor = torch.empty(0, dtype=dtype, device="cpu")
            if count:
                tensor = torch.frombuffer(self._data, dtype=dtype, count=count, offset=self._start + start)
            yield name, tensor.reshape(shape)
