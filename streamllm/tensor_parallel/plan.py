"""The plan of tensor parallelism: which rows or columns of each parameter a process holds.

After Shoeybi et al., Megatron-LM (arXiv 1909.08053). A process holds some of the query heads, the key/value heads
that they read, some of the MLP's inner units, and some of the vocabulary. All else is whole in every process.

    x ── q, k, v (rows) ── attention of its heads ── o (columns) ── sum over the processes ──>
    x ── up, gate (rows) ── activation ── down (columns) ── sum over the processes ──>
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import nn

from streamllm.models.alibi import Alibi
from streamllm.models.base import CausalLM
from streamllm.tensor_parallel.layers import AlibiOfHeads, GatheredHead, SplitEmbedding, SummedLinear
from streamllm.weights.checkpoint import Slice

ROWS, COLUMNS = 0, 1  # dimensions of a weight [out, in]
WHOLE = None

VOCABULARY, QUERY_HEADS, KV_HEADS, MLP_UNITS = "vocabulary", "query heads", "key/value heads", "MLP units"

# Module -> what its weight is split by, and in which dimension. Where rows are split, the bias is split with them.
# Where columns are split, the bias is whole, because it is added once, to the sum over the processes.
PLAN: dict[str, tuple[str, int] | None] = {
    "embed": (VOCABULARY, ROWS),
    "layers.{}.attention_norm": WHOLE,
    "layers.{}.attention.q": (QUERY_HEADS, ROWS),
    "layers.{}.attention.k": (KV_HEADS, ROWS),
    "layers.{}.attention.v": (KV_HEADS, ROWS),
    "layers.{}.attention.q_norm": WHOLE,  # all heads share it
    "layers.{}.attention.k_norm": WHOLE,
    "layers.{}.attention.o": (QUERY_HEADS, COLUMNS),
    "layers.{}.mlp_norm": WHOLE,
    "layers.{}.mlp.gate": (MLP_UNITS, ROWS),
    "layers.{}.mlp.up": (MLP_UNITS, ROWS),
    "layers.{}.mlp.down": (MLP_UNITS, COLUMNS),
    "norm": WHOLE,
    "head": (VOCABULARY, ROWS),
}


@dataclass(frozen=True)
class Share:
    """What process `rank` of `ranks` holds of a model. It is a `Part` of a checkpoint.

    What cannot be divided evenly is divided almost evenly: Falcon-7B's 71 query heads are 17, 18, 18 and 18 of four
    processes. Key/value heads are divided with the query heads that read them. Where they are fewer than the
    processes, several processes hold the same one: each of the four holds Falcon-7B's only one.

    Raises ValueError where the heads cannot be divided among so many processes.
    """

    config: Any  # of the whole model
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        allowed = allowed_ranks(self.config)
        if self.ranks not in allowed:
            raise ValueError(
                f"the model's query heads ({self.config.heads}) and key/value heads ({_kv_heads(self.config)}) "
                f"cannot be divided among {self.ranks} processes: start {list_numbers(allowed)} of them "
                f"(torchrun --nproc-per-node)"
            )

    @cached_property
    def kv_heads(self) -> range:
        """The key/value heads that this process holds."""
        kv_heads = _kv_heads(self.config)
        if self.ranks <= kv_heads:
            return _share(kv_heads, self.rank, self.ranks)
        only = self.rank * kv_heads // self.ranks
        return range(only, only + 1)

    @cached_property
    def heads(self) -> range:
        """The query heads that this process holds."""
        kv_heads = _kv_heads(self.config)
        group = self.config.heads // kv_heads  # query heads that read the same key/value head
        start = self.kv_heads.start * group
        if self.ranks <= kv_heads:
            return range(start, self.kv_heads.stop * group)
        holders = self.ranks // kv_heads  # processes that hold the same key/value head
        held = _share(group, self.rank % holders, holders)
        return range(start + held.start, start + held.stop)

    @cached_property
    def mlp_units(self) -> range:
        """The inner units of each MLP that this process holds."""
        return _share(self.config.mlp_width, self.rank, self.ranks)

    def vocabulary(self, rank: int | None = None) -> range:
        """The token ids whose rows of embedding and head this process, or another, holds."""
        return _share(self.config.vocab_size, self.rank if rank is None else rank, self.ranks)

    def slice(self, name: str) -> Slice | None:
        """The slice of the parameter `name` that this process holds; None: all of it."""
        path, _, attribute = name.rpartition(".")
        planned = _planned(path)
        if planned is WHOLE or (attribute == "bias" and planned[1] == COLUMNS):
            return None
        split_by, dim = planned
        return Slice(dim, self._indices[split_by])

    @cached_property
    def _indices(self) -> dict[str, range]:
        """The rows or columns of this process, by what they are split by."""
        D = self.config.head_dim
        return {
            VOCABULARY: self.vocabulary(),
            QUERY_HEADS: range(self.heads.start * D, self.heads.stop * D),
            KV_HEADS: range(self.kv_heads.start * D, self.kv_heads.stop * D),
            MLP_UNITS: self.mlp_units,
        }

    def build(self, build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
        """The model of this process. `build` makes a model of a config; `config` is that of the whole model.

        It is a model of fewer heads, MLP units and tokens, whose results are summed and gathered where the plan says
        so. Its `geometry` has the key/value heads of this process and the vocabulary of the whole model.
        """
        model = build(self._own_config(config))
        assert isinstance(model, CausalLM)
        model.geometry = dataclasses.replace(model.geometry, vocab_size=config.vocab_size)
        with torch.device(model.embed.weight.device):
            for path, linear in list(model.named_modules()):
                if isinstance(linear, nn.Linear) and _splits_columns(path):
                    parent, _, name = path.rpartition(".")
                    setattr(model.get_submodule(parent), name, SummedLinear.like(linear))
            model.embed = SplitEmbedding(self.vocabulary(), config.width)
            vocabularies = [len(self.vocabulary(rank)) for rank in range(self.ranks)]
            model.head = GatheredHead(config.width, self.rank, vocabularies)
        if config.tied:
            model.head.weight = model.embed.weight
        return model

    def _own_config(self, config: Any) -> Any:
        counts = {"heads": self.heads, "kv_heads": self.kv_heads, "mlp_width": self.mlp_units}
        changes: dict[str, Any] = {name: len(held) for name, held in counts.items() if hasattr(config, name)}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if isinstance(value, Alibi):
                changes[field.name] = AlibiOfHeads(**vars(value), held=self.heads)
        return dataclasses.replace(config, vocab_size=len(self.vocabulary()), **changes)


def allowed_ranks(config: Any) -> list[int]:
    """The numbers of processes among which a model can be divided.

    Up to the number of key/value heads any number; beyond it its multiples, so that the query heads of a process
    all read the same key/value head.
    """
    kv_heads = _kv_heads(config)
    most = min(config.heads, config.mlp_width, config.vocab_size)
    return [ranks for ranks in range(1, most + 1) if ranks <= kv_heads or ranks % kv_heads == 0]


def _kv_heads(config: Any) -> int:
    return getattr(config, "kv_heads", config.heads)  # type: ignore[no-any-return]


def _share(count: int, rank: int, ranks: int) -> range:
    """The share of `rank` in `count` things: consecutive ones, as many as the others have or one more or less."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)


_LAYER_NUMBER = re.compile(r"\.\d+\.")


def _planned(path: str) -> tuple[str, int] | None:
    return PLAN[_LAYER_NUMBER.sub(".{}.", path)]


def _splits_columns(path: str) -> bool:
    planned = _planned(path)
    return planned is not WHOLE and planned[1] == COLUMNS


def list_numbers(numbers: Iterable[int], last: str = "or") -> str:
    """1, 2, 3, 4, 8, 12 -> "1 to 4, 8 or 12"; `last` is the word before the last."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda numbered: numbered[1] - numbered[0])
    ]
    shown: list[str] = []
    for run in runs:
        shown += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {last} {shown[-1]}"
