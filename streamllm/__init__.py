"""streamllm: language models that generate forever in constant memory.

    model, tokenizer = streamllm.load()          # the embedded checkpoint; or load("org/name"), load("folder")
    stream = streamllm.Stream(model, tokenizer)
    for piece in stream.generate("def "):
        print(piece, end="", flush=True)

Importing the package does not import torch: a public name is imported from its module when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamllm.cache import SinkCache
    from streamllm.compiled import CompileError, compile
    from streamllm.generation import generate
    from streamllm.generation_config import GenerationConfig
    from streamllm.load import load, load_model, load_tokenizer
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

# Public name -> the module that defines it. The imports for type checkers above say the same.
_MODULE_OF = {
    "CheckpointError": "streamllm.weights.errors",
    "CheckpointNotFound": "streamllm.weights.errors",
    "CompileError": "streamllm.compiled",
    "GenerationConfig": "streamllm.generation_config",
    "SinkCache": "streamllm.cache",
    "Stream": "streamllm.stream",
    "Tokenizer": "streamllm.tokenizer",
    "TokenizerError": "streamllm.tokenizer",
    "UnsupportedConfig": "streamllm.weights.errors",
    "compile": "streamllm.compiled",
    "generate": "streamllm.generation",
    "load": "streamllm.load",
    "load_model": "streamllm.load",
    "load_tokenizer": "streamllm.load",
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


class _Package(ModuleType):
    """This package. The functions compile, generate and load have the names of the modules that define them.

    When Python imports a submodule, it sets it as an attribute of the package: streamllm.generate would be
    the module from then on. The function is set in its place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and value.__name__ == _MODULE_OF.get(name):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
