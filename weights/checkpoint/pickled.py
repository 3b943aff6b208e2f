"""Old checkpoints: tensors in a pickle (`pytorch_model.bin`), read only if the caller allows it.

A pickle is a program. torch.load(weights_only=True) runs it in an interpreter that allows little but tensors.
That interpreter has been broken before (CVE-2025-32434, fixed in torch 2.6, which is older than what this library
supports).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamllm.weights.checkpoint.stored import SAFETENSORS_DTYPES, StoredTensor
from streamllm.weights.errors import CheckpointError, shorten, show
from streamllm.weights.files import MIN_START_BYTES, check_not_pointer


def is_mapped(path: Path) -> bool:
    """Whether the file is a zip archive, which torch writes since 1.6 and maps; older files are read whole."""
    return zipfile.is_zipfile(path)


def list_pickled(path: Path) -> list[StoredTensor]:
    """The tensors in a pickle, which is run for that."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    return [
        StoredTensor(
            name, path, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), pickled=True
        )
        for name, tensor in unpickle(path).items()
    ]


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors in a pickle by name; they are mapped if the file is an archive.

    Raises CheckpointError for a pickle that holds anything else.
    """
    try:
        with path.open("rb") as file:
            check_not_pointer(path, file.read(MIN_START_BYTES))
        if mapped := is_mapped(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            # torch never compresses. A compressed entry could unpack to more than fits into memory.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is a compressed archive, which torch does not write")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200)
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = "it holds more than tensors"
        raise CheckpointError(
            f"{path} cannot be read as a pickle of tensors ({reason}); download it again"
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not tensors by name")
    size = path.stat().st_size
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {show(name)} is not a plain tensor")
        # A stride of 0 repeats one number over any shape.
        if tensor.device.type != "cpu" or max(tensor.nbytes, tensor.untyped_storage().nbytes()) > size:
            raise CheckpointError(f"{path}: {show(name)} claims to be larger than the file")
    return dict(found)
