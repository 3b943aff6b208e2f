"""Saving an unfinished run to a file, and continuing it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.evaluate.predictions import new_cache
from streamllm.evaluate.result import Result


def save(result: Result, path: str | Path) -> None:
    """Write an unfinished run to a safetensors file: the score so far, and the keys and values in the cache.

    Raises ValueError where the cache has seen more tokens than were scored, as after an interruption in the
    middle of a chunk.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    if result.cache is not None:
        _check_place(result, result.cache)
        tensors = {name: tensor.contiguous() for name, tensor in result.cache.state_dict().items()}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"result": json.dumps(result.to_dict())})
    partial.replace(path)  # an interruption while writing leaves the older file whole


def load(model: nn.Module, path: str | Path) -> Result:
    """Read what `save` wrote; give it to `perplexity` as `resume`.

    Raises ValueError where the cache in the file has other shapes: the file belongs to another model.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        result = Result.from_dict(json.loads(file.metadata()["result"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not state:
        return result
    cache = new_cache(model, result.mode, result.sinks, result.window, 1, quantize=result.quantize)
    try:
        cache.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path} belongs to another model: {error}") from None
    return replace(result, cache=cache)


def continued_cache(result: Result, chunk: int) -> SinkCache | None:
    """The cache to continue a run with; None where the run is between two texts."""
    if result.cache is None:
        if result.place:
            raise ValueError(
                "cannot continue in the middle of a text without the cache: use save and load of "
                "streamllm.evaluate"
            )
        return None
    _check_place(result, result.cache)
    result.cache.chunk = chunk
    return result.cache


def _check_place(result: Result, cache: SinkCache) -> None:
    if int(cache.seen) != result.place:
        raise ValueError(
            f"the cache has moved on: it has seen {int(cache.seen)} tokens, but {result.place} are scored"
        )
