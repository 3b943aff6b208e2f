"""ModelChoice: the model that a command line asks for, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import nn

    from streamllm.tokenizer import Tokenizer

# In smaller models, threads wait for each other longer than they work.
ONE_THREAD_BELOW_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class ModelChoice:
    """The values of the options that choose a model; see `streamllm.load`."""

    name: str | None
    revision: str | None
    dtype: str
    device: str | None
    threads: int | None
    quantize: str | None
    allow_pickle: bool

    @property
    def precision(self) -> str:
        """The types of the weights in words."""
        return self.dtype if self.quantize is None else f"{self.dtype}, {self.quantize} weights"

    def load(self, tensor_parallel: bool = False) -> tuple[nn.Module, Tokenizer]:
        """Load as `streamllm.load` does, and set torch's threads: `threads`, or 1 for a small model."""
        import torch

        from streamllm.loading import load, usable_device

        if not tensor_parallel:  # there, each process has a device of its own
            try:
                usable_device(self.device)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="'--device'") from None
        model, tokenizer = load(
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            quantize=self.quantize,
            allow_pickle=self.allow_pickle,
            tensor_parallel=tensor_parallel,
        )
        threads = self.threads
        if threads is None:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            threads = 1 if parameters < ONE_THREAD_BELOW_PARAMETERS else None
        if threads is not None:
            torch.set_num_threads(threads)
        return model, tokenizer
