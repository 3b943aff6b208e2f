"""The files of a checkpoint -> a model."""

from streamllm.weights.checkpoint.checkpoint import Checkpoint, read_config
from streamllm.weights.checkpoint.part import Part, Slice
from streamllm.weights.checkpoint.placement import LoadJob
from streamllm.weights.checkpoint.reader import TensorReader
from streamllm.weights.checkpoint.shards import INDEX, PICKLE, PICKLE_INDEX, SINGLE
from streamllm.weights.checkpoint.stored import DTYPES, SAFETENSORS_DTYPES, StoredTensor

__all__ = [
    "DTYPES",
    "INDEX",
    "PICKLE",
    "PICKLE_INDEX",
    "SAFETENSORS_DTYPES",
    "SINGLE",
    "Checkpoint",
    "LoadJob",
    "Part",
    "Slice",
    "StoredTensor",
    "TensorReader",
    "read_config",
]
