"""The bytes of the tensors that are alive at the same time."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are created within this context.

    Attributes:
        now: bytes of those that are still alive.
        peak: the largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        created = func(*args, **(kwargs or {}))
        for x in tree_leaves(created):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.add(x.untyped_storage(), x.untyped_storage().nbytes())
        return created

    def add(self, storage: torch.UntypedStorage, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size
