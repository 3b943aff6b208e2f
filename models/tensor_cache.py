"""tensor_cache(): lru_cache for functions that return tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

T = TypeVar("T")


def tensor_cache(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """As lru_cache. While torch.export or torch.compile traces a model, nothing is kept: its tensors have no values."""

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        cached = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*args: object) -> T:
            return make(*args) if torch.compiler.is_compiling() else cached(*args)

        get.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return get

    return decorate
