"""The processes of a tensor-parallel job: joining them, and agreeing on what each could decide differently."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from streamllm.tensor_parallel.collectives import JobError, reporting_lost_processes
from streamllm.tensor_parallel.layers import GatheredHead

Result = TypeVar("Result")

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerFailed(JobError):
    """Another process of the job has failed, and raises its own error."""


@dataclass(frozen=True)
class Job:
    """The processes that hold one model together, as one of them sees it.

    Each process must call the methods in the same order.
    """

    rank: int
    ranks: int
    device: torch.device  # of this process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What the context does succeeds in all processes, or raises in all.

        A process that failed raises its own error; the others raise PeerFailed. Where several failed, PeerFailed
        is the cause of all their errors but the first, so that only one of them needs to be printed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if isinstance(error, JobError) and not isinstance(error, PeerFailed):
                raise  # the others cannot be reached
            failure = error
        sentences = exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
        failed = [rank for rank, sentence in enumerate(sentences) if sentence is not None]
        if not failed:
            return
        peer = PeerFailed(f"process {failed[0]} of the job has failed: {sentences[failed[0]]}")
        if failure is None:
            raise peer
        if failed[0] == self.rank or isinstance(failure, PeerFailed):
            raise failure
        raise failure from peer

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns in the first process. It is called there only."""
        result: Any = None
        with self.all_or_none():
            if self.is_first:
                result = function()
        return exchange(result)[0]  # type: ignore[no-any-return]


def join(device: torch.device | str | None = None) -> Job:
    """Join the processes that torchrun has started, unless this was done before.

    device: None takes the CUDA device that has the number of this process on its machine, or the CPU where there is
    no CUDA. "cuda" takes the same device.

    Raises ValueError where torchrun has not started this process, or where its device is not there.
    """
    if not dist.is_available():
        raise ValueError("tensor_parallel needs torch.distributed, which this build of torch lacks")
    if not dist.is_initialized() and any(name not in os.environ for name in TORCHRUN_VARIABLES):
        raise ValueError(
            "tensor_parallel needs several processes: start the program, or python -m streamllm, by "
            "torchrun --nproc-per-node N"
        )
    own = _own_device(device)
    if not dist.is_initialized():
        if own.type == "cuda":
            torch.cuda.set_device(own)
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Job(dist.get_rank(), dist.get_world_size(), own)


def _own_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'tensor_parallel works on "cpu" and "cuda", not on "{device}"')
    if device.type == "cuda" and device.index is None:
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {index} of this machine has no CUDA device: there are {torch.cuda.device_count()}; start "
                f'no more processes than that, or take device "cpu"'
            )
        device = torch.device("cuda", index)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_reported_elsewhere(error: BaseException) -> bool:
    """Whether another process of the job raises the same error, or the one that this one follows from."""
    return isinstance(error, PeerFailed) or isinstance(error.__cause__, PeerFailed)


def agreed_seed(model: nn.Module, seed: int | None, tokens: Sequence[int] = ()) -> int | None:
    """The seed to sample with: of a tensor-parallel model that of its first process, drawn there where it is None.

    Raises ValueError where the processes feed different tokens.
    """
    if not is_tensor_parallel(model):
        return seed
    own = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")) if seed is None else seed
    given = exchange((own, list(tokens)))
    if any(theirs != given[0][1] for _, theirs in given):
        raise ValueError("the processes of a tensor-parallel model must all generate from the same tokens")
    return int(given[0][0])


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the model is one process' part of a model."""
    return any(isinstance(module, GatheredHead) for module in model.modules())


def exchange(own: Any) -> list[Any]:
    """The objects of all processes, in the order of their ranks."""
    objects: list[Any] = [None] * dist.get_world_size()
    with reporting_lost_processes():
        dist.all_gather_object(objects, own)
    return objects
