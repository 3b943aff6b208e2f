"""The layers of a tensor-parallel model in which processes meet, and ALiBi of some of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.models.alibi import Alibi
from streamllm.models.base import Embedding
from streamllm.models.linear import Linear
from streamllm.models.quantized import INT4_GROUP, has_whole_groups
from streamllm.tensor_parallel.collectives import gather, maximum_, sum_


class SummedLinear(Linear):
    """x [..., in of this process] -> [..., out]: the sum of the products of all processes, then the bias."""

    @staticmethod
    def like(linear: nn.Linear) -> SummedLinear:
        """One of the same shape as `linear`."""
        return SummedLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        total = sum_(self.kernel(x, self.weight, None))
        return total if self.bias is None else total + self.bias

    def row_maxima(self, weight: Tensor) -> Tensor:
        """Over the columns of all processes, so that int8 weights are rounded as in one process."""
        return maximum_(super().row_maxima(weight))

    def has_whole_groups(self) -> bool:
        """As in one process. Raises ValueError where a group would be in two processes."""
        counts = [float(self.in_features), float(not has_whole_groups(self.in_features))]
        inputs, cuts = sum_(torch.tensor(counts, dtype=torch.float64, device=self.weight.device)).tolist()
        is_whole = has_whole_groups(int(inputs))
        if is_whole and cuts:
            raise ValueError(
                f'quantize="int4" rounds groups of {INT4_GROUP} inputs, and the columns of a layer cannot be divided '
                f'among so many processes at the borders of groups: start fewer, or take quantize="int8"'
            )
        return is_whole


class SplitEmbedding(Embedding):
    """int64 [...] -> [..., C]. This process has the rows of the token ids in `vocabulary`; the others add theirs."""

    def __init__(self, vocabulary: range, width: int) -> None:
        super().__init__(len(vocabulary), width)
        self.first = vocabulary.start

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.first
        elsewhere = (row < 0) | (row >= self.num_embeddings)
        x = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return sum_(x.masked_fill(elsewhere[..., None], 0))


class GatheredHead(Linear):
    """x [..., C] -> logits [..., V] of the whole vocabulary. This process has the rows of some tokens."""

    def __init__(self, width: int, rank: int, vocabularies: Sequence[int]) -> None:
        super().__init__(width, vocabularies[rank], bias=False)
        self.vocabularies = tuple(vocabularies)  # how many tokens each process has

    def forward(self, x: Tensor) -> Tensor:
        logits = self.kernel(x, self.weight, None)
        missing = max(self.vocabularies) - logits.shape[-1]  # processes gather tensors of one shape
        if missing:
            logits = F.pad(logits, (0, missing))
        parts = zip(gather(logits, len(self.vocabularies)), self.vocabularies, strict=True)
        return torch.cat([part[..., :count] for part, count in parts], -1)


@dataclass(frozen=True)
class AlibiOfHeads(Alibi):
    """The slopes of some of the heads."""

    held: range = range(0)

    def slopes(self) -> Tensor:
        """float32 [H of this process]."""
        return super().slopes()[self.held.start : self.held.stop]
