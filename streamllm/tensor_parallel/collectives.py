"""What the processes of a tensor-parallel model compute together, by torch.distributed.

Each process calls the same functions in the same order. A recorder of torch's functions (compiled/recorder.py)
sees each of them as one function; a trailing underscore means that it writes to its argument, as in torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

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
        return handle_torch_function(sum_, (x,), x)
    return _reduce(x, dist.ReduceOp.SUM)


def maximum_(x: Tensor) -> Tensor:
    """The largest of the numbers of all processes, in place."""
    return _reduce(x, dist.ReduceOp.MAX)


def gather(x: Tensor, ranks: int) -> list[Tensor]:
    """The tensors x of all processes, which have one shape, in the order of their ranks."""
    if has_torch_function_unary(x):
        return handle_torch_function(gather, (x,), x, ranks)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    with reporting_lost_processes():
        dist.all_gather(parts, x.contiguous())
    return parts


def _reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    x = x.contiguous()
    with reporting_lost_processes():
        dist.all_reduce(x, operation)
    return x


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Within the context, an error of torch.distributed becomes a JobError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = re.sub(r"^\[[^]]*\] *", "", reason)  # the file of Gloo that raised it
        reason = reason.partition(". ")[0]  # advice follows
        raise JobError(
            f"another process of this job has ended or cannot be reached ({shorten(reason)})"
        ) from error
