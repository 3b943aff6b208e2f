"""streamllm: language models that talk for ever in constant memory.

model, tokenizer = streamllm.load()                  # the embedded checkpoint; or a hub name, or a folder
stream = streamllm.Stream(model, tokenizer)
for piece in stream.generate("def "):
    print(piece, end="", flush=True)
"""

from streamllm.cache import SinkCache
from streamllm.compiled import CompileError, compile
from streamllm.generate import generate
from streamllm.load import load, load_model, load_tokenizer
from streamllm.sampling import GenerationConfig
from streamllm.stream import Stream
from streamllm.tokenizer import Tokenizer, TokenizerError
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "CompileError",
    "GenerationConfig",
    "SinkCache",
    "Stream",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedConfig",
    "compile",
    "generate",
    "load",
    "load_model",
    "load_tokenizer",
]
