"""Repositories for the hub on loopback, and checks of error messages."""

import json
import os

import pytest

from streamllm.weights.errors import CheckpointNotFound
from streamllm.weights.source import resolve

NAME = "org/tiny-llama"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PLAIN = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": os.urandom(300_000),
    # As in real repositories, files that must not be downloaded:
    "consolidated.safetensors": b"not this",
    "pytorch_model.bin": b"nor this",
    "original/model.safetensors": b"nor that",
    "README.md": b"# nor that",
}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: b"first",
    SHARDS[1]: b"second",
    "model-00003-of-00002.safetensors": b"stray",
}


def error_message(pattern, *args, kind=CheckpointNotFound, **kwargs):
    """The message of the error that `resolve` raises; it is one line and matches the pattern."""
    with pytest.raises(kind, match=pattern) as caught:
        resolve(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
