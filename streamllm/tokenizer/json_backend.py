"""JsonBackend: a `tokenizer.json`, run by the tokenizers library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import tokenizers

from streamllm.tokenizer.backend import TokenBytes, is_encodable
from streamllm.tokenizer.errors import TokenizerError
from streamllm.tokenizer.json_decoder import DecoderStages
from streamllm.weights.errors import shorten, show

T = TypeVar("T")


class JsonBackend:
    """A `tokenizer.json`. Its post-processor alone decides about BOS and EOS.

    `path` is for messages; `source` is the text of the file.
    """

    file = "tokenizer.json"
    special_ends_bytes = False

    def __init__(self, path: Path, source: str) -> None:
        self._path = path
        self._tokenizer = _call_library(
            partial(tokenizers.Tokenizer.from_str, source),
            f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} can load",
        )
        # Settings of a training run, which are saved in the file; they would cut and pad every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _check_ids(path, vocabulary, _added_ids(source))
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size == 0:
            raise TokenizerError(f"{path}: the vocabulary is empty")
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self.table: dict[int, TokenBytes] = {}
        self._decoder = DecoderStages(path, self._tokenizer.decoder)
        self.utf8_errors = self._decoder.utf8_errors

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")  # raises for half of a surrogate pair; the library would call it a wrong type
        encode = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        ids: list[int] = _call_library(encode, f"the rules of {self._path} fail on this text").ids
        return ids

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token) if is_encodable(token) else None
        return found

    def token_bytes(self, token: int) -> TokenBytes | None:
        name = self._tokenizer.id_to_token(token) if token < 2**32 else None
        if name is None:
            return None
        at_start, elsewhere = _call_library(
            partial(self._decoder.token_bytes, name), f"the decoder of {self._path} fails on token {token}"
        )
        return TokenBytes(at_start, elsewhere, True, name in self._special)

    def edits(self) -> list[Callable[[str], str]]:
        return self._decoder.edits()


def _call_library(call: Callable[[], T], what: str) -> T:
    """The result of a call into the Rust library. All its exceptions become a TokenizerError.

    A damaged file may make it panic. The exception of a panic is a BaseException, not an Exception.
    """
    try:
        return call()
    except Exception as error:
        raise TokenizerError(f"{what}: {shorten(str(error))}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {shorten(str(error))}") from None


def _added_ids(source: str) -> dict[str, int]:
    """The ids that a tokenizer.json gives to its added tokens.

    The library ignores these ids: it numbers added tokens in order, after the vocabulary.
    """
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', source)
    if found is None:
        return {}
    tokens, _ = json.JSONDecoder().raw_decode(source, found.end())
    return {token["content"]: token["id"] for token in tokens if token["content"]}


def _check_ids(path: Path, vocabulary: dict[str, int], added: dict[str, int]) -> None:
    """Raises TokenizerError if two tokens have the same id: encoding and decoding would not agree."""
    owner: dict[int, str] = {}
    for token, index in vocabulary.items():
        if owner.setdefault(index, token) != token:
            raise TokenizerError(
                f"{path}: id {index} belongs to two tokens, {show(owner[index])} and {show(token)}; each "
                f"needs an id of its own"
            )
    for token, index in added.items():
        if vocabulary.get(token) != index:
            problem = f"belongs to {show(owner[index])}" if index in owner else "leaves a gap"
            raise TokenizerError(
                f"{path}: added_tokens gives id {index} to {show(token)}, but that id {problem}; added tokens "
                f"need the ids that follow the vocabulary"
            )
