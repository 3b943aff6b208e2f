"""load(): a checkpoint by name, as a model and a tokenizer that are ready to stream."""

from __future__ import annotations

import os
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamllm.generation_config import GenerationConfig, attach, read_generation_config
from streamllm.malloc import trim_heap
from streamllm.models import linear
from streamllm.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer_files
from streamllm.weights.checkpoint import Checkpoint
from streamllm.weights.checkpoint import Source as Source
from streamllm.weights.config_reader import read_json
from streamllm.weights.errors import CheckpointNotFound
from streamllm.weights.resolve import resolve

PROGRESS_FROM = 1 << 30  # bytes of weights from which a progress bar is worth its line


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
) -> tuple[nn.Module, Tokenizer]:
    """A model and its tokenizer: a hub name ("org/name"), a folder, or None for the embedded checkpoint.

    revision: a branch, tag, commit or "refs/pr/1" of a hub repository. dtype: float64, float32, float16 or
    bfloat16; "auto" is what the checkpoint says it is. device: None takes CUDA if there, then MPS, then the
    CPU. match_transformers reproduces transformers' known deviations (rotary angles in float32, bfloat16
    ALiBi of Falcon, keys of MPT's config that it ignores) and is meant for comparisons only. allow_pickle:
    read old checkpoints that have only pytorch_model.bin; a pickle could run code, so trust its author.
    quantize="int8" rounds the weights of linear layers to 8 bits, one scale for each output, and computes in
    bfloat16 unless dtype says otherwise.

    Raises CheckpointNotFound, UnsupportedConfig or CheckpointError (all CheckpointError) and TokenizerError.
    """
    source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
    tokenizer = _load_tokenizer(source)  # first, because it may be wrong, and is small
    model = _load_model(source, dtype, device, match_transformers, allow_pickle, quantize)
    rows = getattr(model, "geometry").vocab_size  # noqa: B009  # nn.Module declares tensors and modules only
    if tokenizer.vocab_size > rows:
        warnings.warn(
            f"{source.name}: the tokenizer knows {tokenizer.vocab_size} tokens, the model {rows}; a text "
            f"that needs the others cannot be given to it",
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
) -> nn.Module:
    """The model alone; arguments and errors as for `load`."""
    source = open_source(name, revision=revision, local_files_only=local_files_only, token=token)
    return _load_model(source, dtype, device, match_transformers, allow_pickle, quantize)


def load_tokenizer(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Tokenizer:
    """The tokenizer alone; arguments and errors as for `load`."""
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
    """The files behind a name, one revision of them."""
    if name is None:
        name = embedded_folder()
    return resolve(name, revision=revision, local_files_only=local_files_only, token=token)


def embedded_folder() -> Path:
    """The folder of the checkpoint that comes with the package."""
    return Path(str(files("streamllm.weights.embedded")))


def default_device() -> torch.device:
    """CUDA if there, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load_model(
    source: Source,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    match_transformers: bool,
    allow_pickle: bool,
    quantize: str | None,
) -> nn.Module:
    if quantize not in (None, "int8"):
        raise ValueError(f'quantize must be None or "int8", not {quantize!r}')
    if quantize and dtype == "auto":
        dtype = torch.bfloat16  # the fast kernels for int8 take no other
    checkpoint = Checkpoint(source, match_transformers, allow_pickle)
    place = default_device() if device is None else torch.device(device)
    generation_config = _generation_config(source, checkpoint.keys.get("eos_token_id"))
    if checkpoint.nbytes < PROGRESS_FROM:
        model = checkpoint.load(dtype, place)
    else:
        from tqdm import tqdm

        with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc=f"loading {source.name}") as bar:
            model = checkpoint.load(dtype, place, report=bar.update)
    if quantize:
        linear.quantize(model)
    trim_heap()
    attach(model, generation_config)
    return model


def _generation_config(source: Source, eos: Any) -> GenerationConfig:
    found = source.find("generation_config.json")
    values = {} if found is None else read_json(found)
    return read_generation_config({"eos_token_id": eos, **values}, f"generation_config.json of {source.name}")


def _load_tokenizer(source: Source) -> Tokenizer:
    found = {name: path for name in TOKENIZER_FILES if (path := source.find(name)) is not None}
    if not found.keys() & set(TOKENIZER_FILES[:2]):
        if source.offline:
            source.file(TOKENIZER_FILES[0])  # is not in the cache, which is all that is known
        raise CheckpointNotFound(
            f"{source.name} has no tokenizer: neither of {', '.join(TOKENIZER_FILES[:2])}"
        )
    return load_tokenizer_files(next(iter(found.values())).parent)
