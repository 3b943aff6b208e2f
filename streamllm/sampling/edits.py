"""Edits: the few logits that a stream's settings and history change, and how a batch of logits takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Values = NDArray[np.float32]
NO_IDS: Ids = np.zeros(0, np.int64)
NO_VALUES: Values = np.zeros(0, np.float32)


class Edits(NamedTuple):
    """What changes in the logits of one stream, in this order. Within a step, no token occurs twice.

    1. `bias_values` are added to the logits of `bias_ids`; -inf forbids a token.
    2. The logits of `seen_ids` are divided by `repetition_penalty`, or multiplied where negative. Then
       `seen_values` are subtracted.
    3. `late_values` are added to the logits of `late_ids`.
    """

    bias_ids: Ids = NO_IDS
    bias_values: Values = NO_VALUES
    seen_ids: Ids = NO_IDS
    repetition_penalty: float = 1.0
    seen_values: Values = NO_VALUES
    late_ids: Ids = NO_IDS
    late_values: Values = NO_VALUES


def apply_edits(logits: Tensor, edits: Sequence[Edits]) -> Tensor:
    """The logits, [B, V] of any dtype, after the edits of each row: a float32 tensor. `logits` are not changed.

    Rows do not influence each other. The edits go to the device without waiting for it.
    """
    scores = logits.float()
    bias = [(row, edit.bias_ids, edit.bias_values) for row, edit in enumerate(edits) if len(edit.bias_ids)]
    seen = [(row, edit.seen_ids, edit) for row, edit in enumerate(edits) if len(edit.seen_ids)]
    late = [(row, edit.late_ids, edit.late_values) for row, edit in enumerate(edits) if len(edit.late_ids)]
    if not (bias or seen or late):
        return scores
    scores = (scores.clone() if logits.dtype == torch.float32 else scores).contiguous()
    flat = scores.view(-1)
    size = logits.shape[-1]
    if bias:
        at = _flat_index([(row, ids) for row, ids, _ in bias], size, flat)
        flat[at] = flat[at] + _tensor([values for _, _, values in bias], flat)
    if seen:
        at = _flat_index([(row, ids) for row, ids, _ in seen], size, flat)
        penalties = _tensor(
            [np.full(len(ids), edit.repetition_penalty, np.float32) for _, ids, edit in seen], flat
        )
        subtracted = _tensor([edit.seen_values for _, _, edit in seen], flat)
        found = flat[at]
        flat[at] = torch.where(found < 0, found * penalties, found / penalties) - subtracted
    if late:
        at = _flat_index([(row, ids) for row, ids, _ in late], size, flat)
        flat[at] = flat[at] + _tensor([values for _, _, values in late], flat)
    return scores


def _flat_index(rows: Sequence[tuple[int, Ids]], size: int, like: Tensor) -> Tensor:
    return _tensor([ids + row * size for row, ids in rows], like)


def _tensor(parts: Sequence[NDArray[np.int64] | NDArray[np.float32]], like: Tensor) -> Tensor:
    """The parts as one tensor on the device of `like`. They are copied: a history changes its arrays in place."""
    return torch.from_numpy(np.concatenate(parts)).to(like.device, non_blocking=True)
