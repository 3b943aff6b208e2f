"""Whether the state of one cache fits another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], quantize: str | None) -> None:
    """Raises ValueError where `state` is not of a cache like the one whose state is `own`."""
    quantized = "int8" if "layers.0.scales" in state else None
    if quantized != quantize:
        raise ValueError(f"the state belongs to a cache with quantize={quantized!r}, here it is {quantize!r}")
    if own.keys() != state.keys():
        raise ValueError("the state does not belong to a cache of this model: it has other layers")
    for name, tensor in own.items():
        given = state[name]
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
