"""How checkpoints are stored: names on the hub, config.json, safetensors files, names of tensors.

Importing this package does not import torch.
"""

from streamllm.weights.catalogue import FAMILIES, MODEL_TYPES
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig

__all__ = ["FAMILIES", "MODEL_TYPES", "CheckpointError", "CheckpointNotFound", "UnsupportedConfig"]
