"""streamllm: language models that generate forever in constant memory.

    model, tokenizer = streamllm.load()          # the embedded checkpoint; or load("org/name"), load("folder")
    stream = streamllm.Stream(model, tokenizer)
    for piece in stream.generate("def "):
        print(piece, end="", flush=True)

Importing the package does not import torch: a public name is imported from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamllm.cache import SinkCache
    from streamllm.compiled import CompileError, compile
    from streamllm.engine import Engine, complete, generate_batch
    from streamllm.evaluate.scores import score
    from streamllm.generation import generate
    from streamllm.generation_config import GenerationConfig
    from streamllm.loading import load, load_model, load_tokenizer
    from streamllm.pretrained import save_pretrained
    from streamllm.stream import Stream
    from streamllm.tokenizer import Tokenizer, TokenizerError
    from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "CompileError",
    "Engine",
    "GenerationConfig",
    "SinkCache",
    "Stream",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedConfig",
    "compile",
    "complete",
    "generate",
    "generate_batch",
    "load",
    "load_model",
    "load_tokenizer",
    "save_pretrained",
    "score",
]

# Public name -> the module that defines it. The imports for type checkers above say the same.
_MODULE_OF = {
    "CheckpointError": "streamllm.weights.errors",
    "CheckpointNotFound": "streamllm.weights.errors",
    "CompileError": "streamllm.compiled",
    "Engine": "streamllm.engine",
    "GenerationConfig": "streamllm.generation_config",
    "SinkCache": "streamllm.cache",
    "Stream": "streamllm.stream",
    "Tokenizer": "streamllm.tokenizer",
    "TokenizerError": "streamllm.tokenizer",
    "UnsupportedConfig": "streamllm.weights.errors",
    "compile": "streamllm.compiled",
    "complete": "streamllm.engine",
    "generate": "streamllm.generation",
    "generate_batch": "streamllm.engine",
    "load": "streamllm.loading",
    "load_model": "streamllm.loading",
    "load_tokenizer": "streamllm.loading",
    "save_pretrained": "streamllm.pretrained",
    "score": "streamllm.evaluate.scores",
}

if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every misspelled name

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
