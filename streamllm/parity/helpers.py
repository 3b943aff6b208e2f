"""Small functions that several modules of this package need."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from streamllm.loading import LARGE_CHECKPOINT_BYTES
from streamllm.models.rotary import Rope
from streamllm.weights.checkpoint import Checkpoint


def rope_of(config: Any) -> Rope | None:
    """The rotary encoding in a model's Config, which each family keeps under its own name; None for ALiBi."""
    values = (getattr(config, field.name) for field in dataclasses.fields(config))
    return next((value for value in values if isinstance(value, Rope)), None)


def free_memory(checkpoint: Checkpoint) -> None:
    """Free what a released model leaves behind. The collector runs only where that model was large."""
    if checkpoint.nbytes >= LARGE_CHECKPOINT_BYTES:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Without warnings: windows beyond the trained length are compared here on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
