"""The processes of a tensor-parallel job: joining them, and agreeing on what each could decide differently."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from streamllm.tensor_parallel.collectives import ProcessLost, lost
from streamllm.tensor_parallel.layers import GatheredHead

Result = TypeVar("Result")

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerFailed(RuntimeError):
    """Another process of the job has failed, and reports its own error."""


class Job(NamedTuple):
    """The job of processes that hold one model together."""

    rank: int
    ranks: int
    device: torch.device  # of this process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0


def join(device: torch.device | str | None = None) -> Job:
    """Joins the processes that torchrun has started, unless this was done before.

    device: None takes the CUDA device with the number of this process on its machine, or else the CPU. Without an
    index, "cuda" takes the same.

    Raises ValueError where torchrun has not started this process, or where its device is not there.
    """
    if not dist.is_available():
        raise ValueError("tensor_parallel needs torch.distributed, which this build of torch lacks")
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if missing and not dist.is_initialized():
        raise ValueError(
            "tensor_parallel needs several processes, which torchrun starts: torchrun --nproc-per-node 2 "
            "PROGRAM, or for a command torchrun --nproc-per-node 2 -m streamllm generate --tensor-parallel"
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
        raise ValueError(f'tensor_parallel works on "cpu" and "cuda", not on {str(device)!r}')
    if device.type == "cuda" and device.index is None:
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"this machine has {torch.cuda.device_count()} CUDA devices, too few for process {index + 1} of "
                f'it: start fewer processes, or give device="cpu"'
            )
        device = torch.device("cuda", index)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def all_or_none() -> Iterator[None]:
    """What the context does succeeds in all processes, or raises in all.

    A process that failed raises its own error; the others raise PeerFailed. Where several failed, PeerFailed is
    the cause of all their errors but the first, so that one of them can be printed.
    """
    failure: Exception | None = None
    try:
        yield
    except ProcessLost:
        raise
    except Exception as error:
        failure = error
    failures = _exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
    failed = [rank for rank, sentence in enumerate(failures) if sentence is not None]
    if not failed:
        return
    peer = PeerFailed(f"process {failed[0]} of the job has failed: {failures[failed[0]]}")
    if failure is None:
        raise peer
    if failed[0] == dist.get_rank():
        raise failure
    raise failure from peer


def is_reported_elsewhere(error: BaseException) -> bool:
    """Whether another process raises the error that this one follows from, or the same error."""
    return isinstance(error, PeerFailed) or isinstance(error.__cause__, PeerFailed)


def from_first(function: Callable[[], Result]) -> Result:
    """What the function returns in the first process; it is called there only."""
    results: list[Any] = [None]
    with all_or_none():
        if dist.get_rank() == 0:
            results = [function()]
    _checked(dist.broadcast_object_list, results, src=0)
    return results[0]  # type: ignore[no-any-return]


def agreed_seed(model: nn.Module, seed: int | None, tokens: Sequence[int]) -> int | None:
    """The seed of sampling: for a tensor-parallel model that of the first process, a random one where it is None.

    Raises ValueError where the processes feed different tokens.
    """
    if not is_tensor_parallel(model):
        return seed
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    given = _exchange((seed, list(tokens)))
    if any(others != given[0][1] for _, others in given):
        raise ValueError("the processes of a tensor-parallel model must all generate from the same tokens")
    return int(given[0][0])


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the model is one process' part of a model."""
    return any(isinstance(module, GatheredHead) for module in model.modules())


def _exchange(own: Any) -> list[Any]:
    """The objects of all processes, in the order of their ranks."""
    objects: list[Any] = [None] * dist.get_world_size()
    _checked(dist.all_gather_object, objects, own)
    return objects


def _checked(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        raise lost(error) from error
