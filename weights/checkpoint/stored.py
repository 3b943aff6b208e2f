"""StoredTensor: a tensor in a file, before it is read; and the data types that can be loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

# The names of the types in config.json and in arguments.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# The names of the same types in safetensors files. All others (integers, 8-bit floats) are quantised formats.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, before it is read."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    pickled: bool = False  # the file is a pickle, not safetensors

    @property
    def nbytes(self) -> int:
        """Bytes in the file; 0 for a type that cannot be loaded."""
        if self.dtype not in SAFETENSORS_DTYPES:
            return 0
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize
