"""The processes of a tensor-parallel command: one of them prints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from streamllm.tensor_parallel import Job


def join_quietly(device: str | None) -> Job:
    """Join the processes that torchrun has started. Until the command ends, only the first of them prints.

    Raises ValueError where torchrun has not started this process, or where its device is not there.
    """
    from streamllm.tensor_parallel import join

    with _standard_output_closed():
        job = join(device)
    if not job.is_first:
        context = click.get_current_context()
        nowhere = context.with_resource(click.open_file(os.devnull, "w"))
        context.with_resource(contextlib.redirect_stdout(nowhere))
        context.with_resource(contextlib.redirect_stderr(nowhere))
    return job


@contextlib.contextmanager
def _standard_output_closed() -> Iterator[None]:
    """Within the context, nothing reaches standard output: the Gloo of torch 2.9 prints there from C++."""
    sys.stdout.flush()
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(nowhere)
        os.close(saved)
