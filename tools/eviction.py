"""What rounding moved keys once more costs: the error of the logits after evictions, in each type of the cache.

    python tools/eviction.py

The embedded model reads 300 tokens with 4 sinks and a window of 64. Then single entries leave: from the middle, so
that half of the entries move each time, or the oldest ones, so that none moves. The latter is the error of a cache
that leaves the part before the gap where it is, and scores it by a query of its own. Printed is the mean difference of
the next logits from those of the same weights in float64, in standard deviations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import streamllm

SINKS, WINDOW, PROMPT, MORE, STREAMS = 4, 64, 300, 16, 8


def logits(model: nn.Module, tokens: Tensor, evictions: int, middle: bool, quantize: str | None) -> Tensor:
    cache = streamllm.SinkCache(model, SINKS, WINDOW, len(tokens), quantize=quantize)
    with torch.inference_mode():
        model(tokens[:, :PROMPT], cache)
        for _ in range(evictions):
            start = (SINKS + int(cache.held[0])) // 2 if middle else SINKS
            cache.evict_range(start, start + 1)
        return model(tokens[:, PROMPT:], cache).double()


def main() -> None:
    vocabulary = streamllm.load_model().geometry.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (STREAMS, PROMPT + MORE), generator=generator)
    for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")):
        model = streamllm.load_model(dtype=dtype)
        exact = streamllm.load_model(dtype=torch.float64)
        exact.load_state_dict(model.state_dict())
        for evictions in (1, 4, 16):
            errors = []
            for middle in (True, False):
                wanted = logits(exact, tokens, evictions, middle, None)
                got = logits(model, tokens, evictions, middle, quantize)
                errors.append(((got - wanted).abs().mean() / wanted.std()).item())
            print(
                f"{quantize or dtype}, {evictions:2} evictions: moved {errors[0]:.2e}, not moved {errors[1]:.2e}"
            )


if __name__ == "__main__":
    main()
