"""What the processes of a tensor-parallel model compute together, by torch.distributed.

Each process calls the same functions in the same order. A recorder of torch's functions (compiled/recorder.py)
sees each of them as one function; a trailing underscore means that it writes to its argument, as in torch.
"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from streamllm.weights.errors import shorten


class JobError(RuntimeError):
    """The processes of a tensor-parallel job cannot go on together: one has ended, failed or cannot be reached."""


def sum_(x: Tensor) -> Tensor:
    """The sum of the tensors x of all processes, in place. All get the same bits."""
    if has_torch_function_unary(x):
        return handle_torch_function(sum_, (x,), x)  # type: ignore[no-any-return]
    return _reduce(x, dist.ReduceOp.SUM)


def maximum_(x: Tensor) -> Tensor:
    """The largest of the numbers of all processes, in place."""
    return _reduce(x, dist.ReduceOp.MAX)


def gather(x: Tensor, ranks: int) -> list[Tensor]:
    """The tensors x of all processes, which have one shape, in the order of their ranks."""
    if has_torch_function_unary(x):
        return handle_torch_function(gather, (x,), x, ranks)  # type: ignore[no-any-return]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    try:
        dist.all_gather(parts, x.contiguous())
    except RuntimeError as error:
        raise lost(error) from error
    return parts


def _reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    x = x.contiguous()
    try:
        dist.all_reduce(x, operation)
    except RuntimeError as error:
        raise lost(error) from error
    return x


def lost(error: RuntimeError) -> JobError:
    """What an error of torch.distributed means. Gloo puts a file of its own in front of the reason, advice behind."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = re.sub(r"^\[[^]]*\] *", "", reason).partition(". ")[0]
    return JobError(f"another process of this job has ended or cannot be reached ({shorten(reason)})")
