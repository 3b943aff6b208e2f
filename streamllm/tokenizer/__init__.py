"""Text to token ids and back, for tokenizer.json (the tokenizers library) and tokenizer.model (sentencepiece).

Neither transformers, protobuf nor torch is needed. The files are untrusted: a damaged or hostile file raises a
TokenizerError that names it, within limits of size and growth. One danger is left: the tokenizers library ends the
process if memory runs out within it, as it may under a limit of a few hundred megabytes.
"""

from streamllm.tokenizer.decoder import IncrementalDecoder
from streamllm.tokenizer.errors import TokenizerError
from streamllm.tokenizer.files import (
    COMPANION_FILES,
    TOKENIZER_FILES,
    files_of,
    list_template_files,
    load_tokenizer_files,
)
from streamllm.tokenizer.tokenizer import Tokenizer

__all__ = [
    "COMPANION_FILES",
    "TOKENIZER_FILES",
    "IncrementalDecoder",
    "Tokenizer",
    "TokenizerError",
    "files_of",
    "list_template_files",
    "load_tokenizer_files",
]
