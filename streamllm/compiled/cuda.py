"""CUDA graphs: the kernels of one token's forward, captured once and launched together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def capture(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The function as one launch, which reads and writes the same memory each time.

    The result is in the same memory each time, too: the next call overwrites it.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries initialise outside of the capture
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
