"""WeightAddresses: whether the weights are still where a recording reads them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from streamllm.models.packed_weight import PackedWeight


class WeightAddresses:
    """The addresses of a model's weights at the time of recording, from which recordings read."""

    def __init__(self, model: nn.Module | None = None) -> None:
        found = [
            (module._parameters, name, weight)
            for module in (() if model is None else model.modules())
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        # A packed weight has no address. Its blocks are replaced as a whole, never changed in place.
        self._packed = [
            (owner, name, weight.packed) for owner, name, weight in found if isinstance(weight, PackedWeight)
        ]
        dense = [entry for entry in found if not isinstance(entry[2], PackedWeight)]
        self._owners = [owner for owner, _, _ in dense]
        self._names = [name for _, name, _ in dense]
        self._addresses = [weight.data_ptr() for _, _, weight in dense]

    def unchanged(self) -> bool:
        """Whether no weight was replaced, converted or arranged anew. Runs for each token, so without a Python loop."""
        now: Iterable[Any] = map(operator.getitem, self._owners, self._names)
        try:
            same = list(map(Tensor.data_ptr, now)) == self._addresses
        except (RuntimeError, TypeError, KeyError):  # a weight was packed or removed meanwhile
            return False
        return same and all(
            getattr(owner[name], "packed", None) is blocks for owner, name, blocks in self._packed
        )
