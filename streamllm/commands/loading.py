"""Loading a model for a command, with a suitable number of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from streamllm.tokenizer import Tokenizer

ONE_THREAD_BELOW_PARAMETERS = (
    20_000_000  # in smaller models, threads wait for each other longer than they work
)


def load_with_threads(
    name: str | None,
    *,
    revision: str | None,
    dtype: str,
    device: str | None,
    threads: int | None,
    quantize: str | None = None,
    tensor_parallel: bool = False,
) -> tuple[nn.Module, Tokenizer]:
    """Load as `streamllm.load` does, and set torch's threads: `threads`, or 1 for a small model."""
    import torch

    from streamllm import load

    model, tokenizer = load(
        name,
        revision=revision,
        dtype=dtype,
        device=device,
        quantize=quantize,
        tensor_parallel=tensor_parallel,
    )
    if threads is None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        threads = 1 if parameters < ONE_THREAD_BELOW_PARAMETERS else None
    if threads is not None:
        torch.set_num_threads(threads)
    return model, tokenizer
