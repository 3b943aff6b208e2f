"""The header of a safetensors file: which tensors it holds."""

from __future__ import annotations

from pathlib import Path

from streamllm.weights.checkpoint.stored import StoredTensor
from streamllm.weights.errors import CheckpointError, shorten
from streamllm.weights.files import MIN_START_BYTES, check_not_pointer

MAX_HEADER_BYTES = 25_000_000  # the hub's limit too; a parsed header takes ten times its size in memory


def list_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors in a safetensors file, from its header alone. Raises CheckpointError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            start = file.read(MIN_START_BYTES)
        check_not_pointer(path, start)
        length = int.from_bytes(start[:8], "little")
        if MAX_HEADER_BYTES < length < path.stat().st_size:
            raise CheckpointError(
                f"{path} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                StoredTensor(name, path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not an intact safetensors file ({shorten(str(error))}); download it again"
        ) from None
