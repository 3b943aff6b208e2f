"""The processes of a tensor-parallel command: one of them prints."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from streamllm.tensor_parallel import Job


def join_quietly(device: str | None) -> Job:
    """Join the processes that torchrun has started. Until the command ends, only the first of them prints.

    Raises ValueError where torchrun has not started this process, or where its device is not there.
    """
    from streamllm.tensor_parallel import join

    job = join(device)
    if not job.is_first:
        context = click.get_current_context()
        nowhere = context.with_resource(click.open_file(os.devnull, "w"))
        context.with_resource(contextlib.redirect_stdout(nowhere))
        context.with_resource(contextlib.redirect_stderr(nowhere))
    return job
