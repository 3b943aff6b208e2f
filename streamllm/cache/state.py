"""The state of a cache as tensors: what was taken out of each row, and whether a state fits a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamllm.cache.entries import Row
from streamllm.cache.ring import Layout

STATE_VERSION = 1
SLOT_AXIS = -2  # of every tensor of a ring: [(2,) B, G, slots, D or 1]
FIRST_KEYS = {"version", "rows"}  # those that a state without a version lacks


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], quantize: str | None) -> None:
    """Raises ValueError where `state` is not of a cache like the one whose state is `own`."""
    quantized = "int8" if "layers.0.scales" in state else None
    if quantized != quantize:
        raise ValueError(f"the state belongs to a cache with quantize={quantized!r}, here it is {quantize!r}")
    if "version" in state and state["version"].tolist() != [STATE_VERSION]:
        raise ValueError(
            f"the state has version {state['version'].tolist()}, and this version of streamllm reads "
            f"[{STATE_VERSION}]: load it with the version that saved it"
        )
    if own.keys() != state.keys() | (set() if "version" in state else FIRST_KEYS):
        raise ValueError("the state does not belong to a cache of this model: it has other layers")
    for name, given in state.items():
        tensor = own[name]
        if name.startswith("layers.") and given.dim() == tensor.dim():  # the state may have fewer slots
            fits = given.shape[SLOT_AXIS] <= tensor.shape[SLOT_AXIS]
            tensor = tensor.narrow(SLOT_AXIS, 0, given.shape[SLOT_AXIS]) if fits else tensor
        if given.shape != tensor.shape or given.dtype != tensor.dtype:
            raise ValueError(
                f"the state belongs to another cache: {name} is {given.dtype} {list(given.shape)}, "
                f"here {tensor.dtype} {list(tensor.shape)}"
            )
    if not torch.equal(own["sizes"], state["sizes"]):
        raise ValueError(
            f"the state belongs to a cache of other sinks, window and origin: {state['sizes'].tolist()}, "
            f"here {own['sizes'].tolist()}"
        )


def check_stored(used: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where `state` has fewer slots than its streams have used."""
    for name, tensor in used.items():
        needed, given = tensor.shape[SLOT_AXIS], state[name].shape[SLOT_AXIS]
        if given < needed:
            raise ValueError(f"the state is damaged: {name} has {given} slots, and its streams used {needed}")


def slots_written(rows: Sequence[Row], t: Sequence[int]) -> int:
    """How many of the first slots of a ring some row may have written, at most all."""
    return max(max(row.highest, at) for row, at in zip(rows, t, strict=True))


def state_of_rows(rows: Sequence[Row]) -> Tensor:
    """int64 [B, 3 + distinct windows]: ahead, highest and lowest of each row, and its starts; see `Row`."""
    return torch.tensor(
        [[row.ahead, row.highest, row.lowest, *row.starts] for row in rows], dtype=torch.int64, device="cpu"
    )


def rows_of_state(
    state: Mapping[str, Tensor], layouts: Sequence[Layout]
) -> tuple[list[int], tuple[Row, ...]]:
    """t and what was taken out, by row. Raises ValueError for numbers that no cache can have."""
    seen, sinks = state["seen"].tolist(), layouts[0].sinks
    if "rows" not in state:
        # A token may have been begun and undone: then what it pushed out is gone.
        rows = [Row((sinks,) * len(layouts), highest=t + 1) for t in seen]
    else:
        rows = [
            Row(tuple(starts), ahead, highest, lowest)
            for ahead, highest, lowest, *starts in state["rows"].tolist()
        ]
    t = [count - row.ahead for count, row in zip(seen, rows, strict=True)]
    for number, row in enumerate(rows):
        last = max(t[number], sinks)
        beyond = max(*row.starts, row.lowest, *(row.highest - layout.window for layout in layouts))
        least = min(t[number], row.ahead, row.highest, row.lowest, *(start - sinks for start in row.starts))
        if least < 0 or beyond > last:
            raise ValueError(
                f"the state is damaged: row {number} has seen {seen[number]} tokens and has {row}"
            )
    return t, tuple(rows)
