"""Where the files of a checkpoint come from: a local folder, or one commit of a model on the hub."""

from streamllm.weights.source.resolve import resolve
from streamllm.weights.source.source import Source

__all__ = ["Source", "resolve"]
