"""TensorReader: reads tensors through memory maps, and releases the pages that were read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from streamllm.weights.checkpoint.pickled import is_mapped, unpickle
from streamllm.weights.checkpoint.stored import StoredTensor
from streamllm.weights.errors import CheckpointError, shorten

MAX_BYTES_PER_MAP = 64 << 20  # read through one map before it is replaced by a new one


class TensorReader:
    """Reads the tensors of a checkpoint one by one.

    A tensor of a safetensors file is a view of the file's memory map. The pages that were touched through a
    map stay in memory as long as any view of it lives. So each file has two maps: one for tensors that stay,
    and one for tensors that are only copied from. The second is replaced from time to time, which releases
    its pages. It is not replaced after every tensor, because a file's header (up to 25 MB) is parsed again
    whenever the file is opened.
    """

    def __init__(self) -> None:
        self._lasting: dict[Path, Callable[[str], Tensor]] = {}
        self._passing: tuple[Path, Callable[[str], Tensor]] | None = None
        self._passing_bytes = 0  # read through the passing map

    def read(self, stored: StoredTensor, keep: bool) -> Tensor:
        """The tensor. `keep`: the caller keeps it as it is, as a view of the map."""
        from safetensors import SafetensorError

        path = stored.path
        try:
            # A pickle that cannot be mapped is read whole, so it is read only once.
            if keep or (stored.pickled and not is_mapped(path)):
                if path not in self._lasting:
                    self._lasting[path] = _open(stored)
                return self._lasting[path](stored.name)
            self._passing_bytes += stored.nbytes
            if self._passing is None or self._passing[0] != path or self._passing_bytes > MAX_BYTES_PER_MAP:
                self._passing = None  # releases the old map first
                self._passing, self._passing_bytes = (path, _open(stored)), stored.nbytes
            return self._passing[1](stored.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} has changed while it was read ({shorten(str(error))})") from None


def _open(stored: StoredTensor) -> Callable[[str], Tensor]:
    """A new map of the tensor's file: a function from a tensor's name to the tensor."""
    if stored.pickled:
        return unpickle(stored.path).__getitem__
    from safetensors import safe_open

    file: Any = safe_open(stored.path, framework="pt", device="cpu")
    return file.get_tensor  # type: ignore[no-any-return]
