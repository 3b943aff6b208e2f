"""load(): the name of a checkpoint -> its model and its tokenizer, ready for streaming."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from streamllm.generation_config import GenerationConfig, attach, read_generation_config
from streamllm.malloc import trim_heap
from streamllm.models import quantized
from streamllm.tensor_parallel import Job, Share, join
from streamllm.tokenizer import TOKENIZER_FILES, Tokenizer, list_template_files, load_tokenizer_files
from streamllm.weights.checkpoint import Checkpoint
from streamllm.weights.errors import CheckpointNotFound
from streamllm.weights.files import read_json
from streamllm.weights.source import Source, resolve

LARGE_CHECKPOINT_BYTES = 1 << 30  # of weights; from here on a progress bar is shown
QUANTIZED_DTYPE = (
    torch.bfloat16
)  # the default with rounded weights: their fast kernels for a CPU have no other type


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    match_transformers: bool = False,
    local_files_only: bool = False,
    token: str | None = None,
    allow_pickle: bool = False,
    quantize: str | None = None,
    tensor_parallel: bool = False,
) -> tuple[nn.Module, Tokenizer]:
    """The model and the tokenizer of a checkpoint.

    The model is ready for inference: its weights are frozen. To train it, call `model.requires_grad_(True)` and
    `model.train()`; `model.eval()` afterwards stores the weights again as the CPU reads them fastest.

    Args:
        name: a hub name ("org/name"), a folder, or None for the embedded checkpoint.
        revision: a branch, tag, commit or "refs/pr/1" of a hub repository.
        dtype: float64, float32, float16 or bfloat16, as a torch.dtype or its name; "auto" is the type that
            config.json names, or else that of the first tensor.
        device: None takes CUDA if available, then MPS, then the CPU.
        match_transformers: reproduce transformers' known deviations (rotary angles in float32, bfloat16 ALiBi
            of Falcon, ignored keys of MPT's config). It is meant for comparisons only.
        local_files_only: download nothing; the hub's cache must have the files.
        token: a hub token; None takes HF_TOKEN or the one that `hf auth login` saved.
        allow_pickle: read old checkpoints that have only pytorch_model.bin. A pickle could run code, so allow
            it only if you trust its author.
        quantize: "int8" rounds the weights of linear layers to 8 bits, with one scale for each output; "int4" to 4
            bits, with one for each 32 inputs, but the head to 8, and layers whose inputs are no multiple of 32. Both
            compute in bfloat16 unless `dtype` names another type.
        tensor_parallel: hold only this process' part of the model, which the processes that torchrun has started
            compute together. Each must make the same calls. With CUDA, each takes a device of its own.

    Raises:
        CheckpointNotFound: there is no such checkpoint or file, no permission, or no network.
        UnsupportedConfig: the checkpoint asks for something that is not implemented.
        CheckpointError: its files are damaged. (The two above are subclasses.)
        TokenizerError: the files of its tokenizer are damaged or not supported.
        ValueError: another `dtype` or `quantize`; with `tensor_parallel`, a process that torchrun has not started, or
            a number of processes among which the model's heads cannot be divided.
        streamllm.tensor_parallel.JobError: another process of a tensor-parallel job has failed or ended.
    """
    with _job(tensor_parallel, device) as job:
        source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
        tokenizer = _load_tokenizer(source)  # before the weights: it is small, and may be damaged
        model = _load_model(source, dtype, device, match_transformers, allow_pickle, quantize, job)
    rows = getattr(model, "geometry").vocab_size  # noqa: B009  # nn.Module declares tensors and modules only
    if tokenizer.vocab_size > rows:
        warnings.warn(
            f"{source.name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}; the "
            f"model refuses texts that contain the others",
            stacklevel=2,
        )
    return model, tokenizer


def load_model(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    match_transformers: bool = False,
    local_files_only: bool = False,
    token: str | None = None,
    allow_pickle: bool = False,
    quantize: str | None = None,
    tensor_parallel: bool = False,
) -> nn.Module:
    """Only the model of a checkpoint. Arguments and errors as for `load`."""
    with _job(tensor_parallel, device) as job:
        source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
        return _load_model(source, dtype, device, match_transformers, allow_pickle, quantize, job)


def load_tokenizer(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Tokenizer:
    """Only the tokenizer of a checkpoint. Arguments and errors as for `load`."""
    return _load_tokenizer(
        open_source(name, revision=revision, local_files_only=local_files_only, token=token)
    )


def open_source(
    name: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Source:
    """The files of a checkpoint. Arguments and errors as for `load`."""
    if name is None:
        name = embedded_folder()
    return resolve(name, revision=revision, local_files_only=local_files_only, token=token)


def check_quantize(quantize: str | None) -> None:
    """Raises ValueError for a type that weights cannot be rounded to."""
    if quantize is not None and quantize not in tuple(quantized.FORMATS):
        raise ValueError(f'quantize must be None, "int8" or "int4", not {quantize!r}')


def embedded_folder() -> Path:
    """The folder of the checkpoint that is part of the package."""
    return Path(str(files("streamllm.weights.embedded")))


def default_device() -> torch.device:
    """CUDA if available, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device, after a first use of it; None is `default_device`. Raises ValueError if torch cannot use it here."""
    if device is None:
        return default_device()
    try:
        torch.zeros(1, dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the device {str(device)!r} cannot be used here ({reason}); supported: cpu, and cuda or mps where "
            f"torch finds them"
        ) from None
    return torch.device(device)


@contextmanager
def weights_progress(total_bytes: int, description: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error, for large checkpoints only; the value takes the bytes just done."""
    if total_bytes < LARGE_CHECKPOINT_BYTES:
        yield lambda done_bytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=description) as bar:
        yield bar.update


@contextmanager
def _job(tensor_parallel: bool, device: torch.device | str | None) -> Iterator[Job | None]:
    """The job of a tensor-parallel model, which is loaded by all of its processes or by none; else None."""
    if not tensor_parallel:
        yield None
        return
    job = join(device)
    with job.all_or_none():
        yield job


def _load_model(
    source: Source,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    match_transformers: bool,
    allow_pickle: bool,
    quantize: str | None,
    job: Job | None,
) -> nn.Module:
    check_quantize(quantize)
    if quantize and dtype == "auto":
        dtype = QUANTIZED_DTYPE
    checkpoint = Checkpoint(source, match_transformers, allow_pickle)
    part = None if job is None else Share(checkpoint.config, job.rank, job.ranks)
    target = job.device if job else usable_device(device)
    generation_config = _generation_config(source)
    shown_bytes = checkpoint.nbytes if job is None or job.is_first else 0
    with weights_progress(shown_bytes, f"loading {source.name}") as report:
        model = checkpoint.load(dtype, target, report, part, quantize)
    trim_heap()
    attach(model, generation_config)
    return model


def _generation_config(source: Source) -> GenerationConfig:
    """From generation_config.json alone where it exists; else from config.json, as older checkpoints have it."""
    for name in ("generation_config.json", "config.json"):
        found = source.find(name)
        if found is not None:
            return read_generation_config(read_json(found), f"{name} of {source.name}")
    return GenerationConfig()


def _load_tokenizer(source: Source) -> Tokenizer:
    found = {name: path for name in TOKENIZER_FILES if (path := source.find(name)) is not None}
    for name in list_template_files(source):
        source.find(name)  # downloads it
    if not found.keys() & set(TOKENIZER_FILES[:2]):
        if source.offline:
            source.file(TOKENIZER_FILES[0])  # raises: the file may exist on the hub, but is not in the cache
        raise CheckpointNotFound(
            f"{source.name} has no tokenizer: neither of {', '.join(TOKENIZER_FILES[:2])}"
        )
    return load_tokenizer_files(next(iter(found.values())).parent)
