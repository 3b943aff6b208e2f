"""Old checkpoints: tensors in a pickle (`pytorch_model.bin`), read only when the caller consents.

A pickle is a program. torch.load(weights_only=True) runs it in an interpreter that knows tensors and little
else, which has been broken before (CVE-2025-32434, fixed in torch 2.6, the least that this library takes).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamllm.weights.errors import CheckpointError


def is_mapped(path: Path) -> bool:
    """Whether the file is a zip archive, as torch writes them since 1.6: those are mapped, older ones read
    whole."""
    return zipfile.is_zipfile(path)


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, mapped where the file is an archive. Raises CheckpointError for
    anything else."""
    try:
        if mapped := is_mapped(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            # torch never compresses; a compressed entry could unpack to more than any memory.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is a compressed archive, which torch does not write")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # whatever a broken or hostile program raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            first = "it holds more than tensors"
        raise CheckpointError(
            f"{path} cannot be read as a pickle of tensors ({first}); download it again"
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not tensors by name")
    size = path.stat().st_size
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {ascii(name)[:120]} is no plain tensor")
        # One number can be spread over any shape by strides of 0.
        if tensor.device.type != "cpu" or max(tensor.nbytes, tensor.untyped_storage().nbytes()) > size:
            raise CheckpointError(f"{path}: {ascii(name)[:120]} claims to be larger than the file")
    return dict(found)
