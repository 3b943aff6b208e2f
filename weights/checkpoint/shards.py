"""Which files hold the weights, and which tensors are in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from streamllm.weights.checkpoint.pickled import list_pickled
from streamllm.weights.checkpoint.safetensors_file import list_safetensors
from streamllm.weights.checkpoint.stored import StoredTensor
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig, list_names
from streamllm.weights.files import read_json
from streamllm.weights.source import Source

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


def list_tensors(source: Source, allow_pickle: bool) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by their names in its files.

    A single file comes before an index, as in transformers: a model that was saved again in one file may leave the
    index of its shards behind. Such a file must hold all tensors that the index lists. A pickle is read only with
    `allow_pickle`. Raises CheckpointError for damaged or missing files, and UnsupportedConfig for weights in a
    pickle that may not be read.
    """
    formats = [(INDEX, SINGLE, list_safetensors)]
    if allow_pickle:
        formats.append((PICKLE_INDEX, PICKLE, list_pickled))
    for index_name, single_name, list_file in formats:
        index, single = source.find(index_name), source.find(single_name)
        weight_map = {} if index is None else _read_weight_map(index)
        if single is not None:
            tensors = {stored.name: stored for stored in list_file(single)}
            if tensors.keys() >= weight_map.keys():
                return tensors
        if index is not None:
            return _list_shards(source, weight_map, list_file)
    raise _no_weights(source)


def _read_weight_map(index: Path) -> Mapping[str, str]:
    """The name of the shard of each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the file again")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files")
    return weight_map


def _list_shards(
    source: Source, weight_map: Mapping[str, str], list_file: Callable[[Path], list[StoredTensor]]
) -> dict[str, StoredTensor]:
    """All tensors of all shards that the index names, whether it lists them or not."""
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for stored in list_file(source.file(shard)):
            if stored.name in tensors and weight_map.get(stored.name) != shard:
                continue  # the tensor is in two shards, and the index names the other
            tensors[stored.name] = stored
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(f"{source.name}: the index lists {list_names(lost)}, but no shard has them")
    return tensors


def _no_weights(source: Source) -> CheckpointError:
    if source.offline:
        source.file(SINGLE)  # raises: the file may exist on the hub, but it is not in the cache
    for name in (PICKLE, PICKLE_INDEX):
        if source.has(name):
            return UnsupportedConfig(
                f"{source.name} has its weights only as {name}, a pickle, which could run code; if you trust "
                f"its author, load it with allow_pickle=True (--allow-pickle), or convert it to safetensors with "
                f"'streamllm convert {source.name} NEW_FOLDER --allow-pickle'"
            )
    return CheckpointNotFound(f"{source.name} has no weights: neither {SINGLE} nor {INDEX}")
