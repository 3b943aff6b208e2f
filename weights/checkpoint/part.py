"""Part: what one process of several holds of a model, so that it reads only that from the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Split = Callable[[Tensor, Any], tuple[Tensor, ...]]


class Slice(NamedTuple):
    """Consecutive rows or columns of a parameter."""

    dim: int  # 0: rows, 1: columns
    indices: range

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor, as a view."""
        return tensor.narrow(self.dim, self.indices.start, len(self.indices))


class Part(Protocol):
    """The part of a model that one process holds."""

    def build(self, build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
        """The model of this process. `build` makes a model of a config; `config` is that of the whole model."""
        ...

    def slice(self, name: str) -> Slice | None:
        """What it holds of the parameter `name`; None: all of it."""
        ...


def cut(whole: Tensor, split: Split | None, config: Any, slices: Sequence[Slice | None]) -> list[Tensor]:
    """The slices of the parameters that one tensor of a file holds, one for each parameter.

    `whole` is a view of the file, of which only the rows or columns of the slices are read. `split` and `config`
    are those of a fused tensor: splitting the numbers of its rows tells which row holds which row of a parameter.
    """
    if split is None:
        (part,) = slices
        return [whole if part is None else part.of(whole)]
    rows = split(torch.arange(len(whole), dtype=torch.int64, device="cpu"), config)
    assert all(part is None or part.dim == 0 for part in slices)
    return [
        whole[own if part is None else part.of(own)] for own, part in zip(rows, slices, strict=True)
    ]  # indexing copies
