"""Sizes of models, and Spec: one system, one task, one setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 128, "vocab_size": 256},
    "S": {"width": 256, "layers": 8, "heads": 4, "kv_heads": 4, "mlp_width": 688, "vocab_size": 4096},
    "M": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 12, "mlp_width": 2048, "vocab_size": 32000},
    "7B": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp_width": 11008, "vocab_size": 32000},
    "8B": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "vocab_size": 128256},
    "1B": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "vocab_size": 128256},
}
SINKS = 4
ROUNDED = ("int8", "int4")  # values of --dtype that round the weights

Round = Callable[[], None]  # decodes, scores or prefills `Spec.tokens` tokens, and waits until that is done


@dataclass(frozen=True)
class Spec:
    """What one process builds and runs."""

    system: str  # a key of systems.SYSTEMS
    task: str  # "decode", "score", "prefill" or "memory"
    model: str  # a key of SIZES
    dtype: str
    window: int
    batch: int
    threads: int
    device: str
    tokens: int  # per round, decoded, scored or prefilled

    @property
    def quantize(self) -> str | None:
        """What the weights are rounded to."""
        return self.dtype if self.dtype in ROUNDED else None

    @property
    def computes_in(self) -> str:
        """The type of activations and cache."""
        return "bfloat16" if self.quantize else self.dtype

    @property
    def label(self) -> str:
        """The first column of the tables: everything but the system."""
        text = f"{self.task} {self.model} {self.dtype} W={self.window} batch={self.batch}"
        return f"{text} {self.device if self.device != 'cpu' else f'{self.threads} threads'}"


def random_tokens(spec: Spec, length: int) -> Any:
    """Token ids [batch, length] on the device, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = SIZES[spec.model]["vocab_size"]
    return torch.randint(vocabulary, (spec.batch, length), generator=generator).to(spec.device)


def synchronize(spec: Spec) -> None:
    """Wait until the device has finished its queue. A CPU has none."""
    if spec.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
