"""SentencePieceBackend: a `tokenizer.model`, run by the sentencepiece library with the model's own normaliser."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from streamllm.tokenizer.backend import REPLACE_EACH_BYTE, TokenBytes, byte_fallback, is_encodable
from streamllm.tokenizer.errors import TokenizerError
from streamllm.tokenizer.protobuf import (
    WITH_PREFIX_SPACE,
    WITHOUT_PREFIX_SPACE,
    DamagedModel,
    HasDenormalizer,
    decoding_drops_spaces,
)
from streamllm.tokenizer.special_tokens import AddedToken
from streamllm.weights.errors import shorten, show

_SPACE = "\u2581"  # what sentencepiece writes for a space
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class SentencePieceBackend:
    """A `tokenizer.model`.

    sentencepiece reads `"</s>"` in a text as characters. So a text is first split at added and special tokens.

    Args:
        path: for messages.
        data: the content of the file.
        added: tokens that the model itself does not have, by id.
        named: the special tokens that a file names, by name (`bos_token` …).
        extra: special tokens without a name.
        add_bos: put BOS in front of every text; None: if the model has one.
        add_eos: put EOS behind every text.
        prefix: which segments between special tokens get the model's prefix space: "every", "first", "none".
    """

    file = "tokenizer.model"
    special_ends_bytes = True
    utf8_errors = REPLACE_EACH_BYTE

    def __init__(
        self,
        path: Path,
        data: bytes,
        added: Mapping[int, AddedToken],
        named: Mapping[str, AddedToken],
        extra: Iterable[AddedToken],
        *,
        add_bos: bool | None,
        add_eos: bool,
        prefix: str,
    ) -> None:
        self._path = path
        if _TIKTOKEN_LINE.match(data):
            raise TokenizerError(
                f"{path} is a tiktoken vocabulary, not a sentencepiece model; put the tokenizer.json of the "
                f"same model beside it"
            )
        self._model = self._load(data)
        self._drops_one_space, self._drops_all_spaces = self._read_drops(
            data + WITHOUT_PREFIX_SPACE if prefix == "none" else data
        )
        self._without_prefix = self._load(data + WITHOUT_PREFIX_SPACE)
        self._with_prefix = self._load(data + WITH_PREFIX_SPACE) if self._drops_all_spaces else self._model
        self._first_segment = self._without_prefix if prefix == "none" else self._model
        self._later_segments = self._model if prefix == "every" else self._without_prefix
        self.prefix_behind_added = prefix == "every"
        self._names = self._read_names()
        self._model_size = len(self._names)
        self._added = dict(added)
        self.vocab_size = max(self._model_size, 1 + max(self._added, default=-1))
        self._added_ids = self._check_added()
        self.table: dict[int, TokenBytes] = {}
        own_special = self._own_special_tokens()
        self.special_tokens = own_special | {name: token.content for name, token in named.items()}
        declared = [*named.values(), *extra, *self._added.values()]
        self._special = {token.content for token in declared if token.special}
        split_at = {content: AddedToken(content) for content in own_special.values()}
        split_at |= {token.content: token for token in declared}
        self._split_at = {
            content: token for content, token in split_at.items() if self.token_to_id(content) is not None
        }
        if add_bos is None:
            add_bos = "bos_token" in self.special_tokens
        ordinary = [token for token in self._split_at.values() if not self._is_special(token.content)]
        self.special_contents: Collection[str] = [
            content for content in self._split_at if self._is_special(content)
        ]
        self._any_token, self._ordinary_token = _any_of(self._split_at.values()), _any_of(ordinary)
        self.added_ids: Collection[int] = {self._id_of(content) for content in self._split_at}
        if add_bos is None:
            add_bos = "bos_token" in self.special_tokens
        self.before = [self._required_id("bos_token")] if add_bos else []
        self.after = [self._required_id("eos_token")] if add_eos else []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._encode(text, self._first_segment, self._any_token)
        return [*self.before, *ids, *self.after] if add_special_tokens else ids

    def encode_piece(self, text: str, prefix: bool, special_tokens: bool) -> list[int]:
        first = self._first_segment if prefix else self._without_prefix
        split_at = self._any_token if special_tokens else self._ordinary_token
        if not self._drops_all_spaces:
            return self._encode(text, first, split_at)
        # The model's normaliser removes the spaces around a text; those between two parts belong to it.
        normalized = self._model.normalize(f"a{text}a")
        if not prefix and normalized.removeprefix(_SPACE)[1:].startswith(_SPACE):
            first = self._with_prefix
        ids = self._encode(text, first, split_at)
        space = self.token_to_id(_SPACE)
        if text and space is not None and normalized.removesuffix(_SPACE)[:-1].endswith(_SPACE):
            ids.append(space)
        return ids

    def _encode(self, text: str, model: Any, split_at: re.Pattern[str]) -> list[int]:
        """The ids of a text. `model` encodes what comes before the first added token."""
        text.encode("utf-8")  # raises for half of a surrogate pair; the caller explains it
        ids: list[int] = []
        for segment in self._segments(text, split_at):
            try:
                ids += [segment] if isinstance(segment, int) else model.encode(segment)
            except Exception as error:
                raise TokenizerError(
                    f"the rules of {self._path} fail on this text: {shorten(str(error))}"
                ) from error
            model = self._later_segments
        return ids

    def token_to_id(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        if not is_encodable(token):
            return None
        index: int = self._model.piece_to_id(token)  # the id of <unk> for an unknown token
        return index if self._names[index] == token else None

    def id_to_token(self, token: int) -> str | None:
        if token in self._added:
            return self._added[token].content
        return self._names[token] if token < self._model_size else None

    def token_bytes(self, token: int) -> TokenBytes | None:
        if token in self._added:
            added = self._added[token]
            content = added.content.encode()
            return TokenBytes(content, content, True, added.special)
        if token >= self._model_size:
            return None
        model = self._model
        name = self._names[token]
        if name in self._special or model.is_control(token):
            return TokenBytes(name.encode(), name.encode(), True, True)
        if model.is_byte(token):
            data = byte_fallback(name)
            return TokenBytes(data, data, True, False)
        if model.is_unknown(token):
            surface = model.decode([token]).encode()
            return TokenBytes(surface, surface, bool(surface), False)
        elsewhere = name.replace(_SPACE, " ").encode()
        is_dropped = self._drops_one_space and name.startswith(_SPACE)
        at_start = elsewhere[1:] if is_dropped else elsewhere
        ends_start = bool(at_start) or (is_dropped and not self._drops_all_spaces)
        return TokenBytes(at_start, elsewhere, ends_start, False)

    def edits(self) -> list[Callable[[str], str]]:
        return []

    # What the constructor reads and checks.

    def _load(self, data: bytes) -> Any:
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(data)
        except Exception as error:
            raise TokenizerError(
                f"{self._path} is not a model that sentencepiece {sentencepiece.__version__} can load: "
                f"{shorten(str(error))}"
            ) from error
        return model

    def _read_drops(self, data: bytes) -> tuple[bool, bool]:
        try:
            return decoding_drops_spaces(data)
        except HasDenormalizer:
            raise TokenizerError(
                f"{self._path} has a denormalizer, which rewrites decoded text as a whole; a stream cannot do "
                f"that"
            ) from None
        except DamagedModel as error:
            raise TokenizerError(
                f"{self._path} is damaged: it is not a complete protobuf message; download it again"
            ) from error

    def _read_names(self) -> list[str]:
        try:
            names: list[str] = self._model.id_to_piece(list(range(self._model.vocab_size())))
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{self._path} is damaged: one of its pieces is not text ({error}); download it again"
            ) from error
        return names

    def _own_special_tokens(self) -> dict[str, str]:
        """The special tokens that the model itself names."""
        ids = {
            "bos_token": self._model.bos_id(),
            "eos_token": self._model.eos_id(),
            "unk_token": self._model.unk_id(),
            "pad_token": self._model.pad_id(),
        }
        return {name: self._names[index] for name, index in ids.items() if 0 <= index < self._model_size}

    def _check_added(self) -> dict[str, int]:
        """The ids of the added tokens by content."""
        ids: dict[str, int] = {}
        for index, token in self._added.items():
            if index < self._model_size and self._names[index] != token.content:
                raise TokenizerError(
                    f"{self._path.parent}: the added token {show(token.content)} has id {index}, which is "
                    f"{show(self._names[index])} in tokenizer.model; added tokens need ids above the model's, "
                    f"from {self._model_size} on"
                )
            if ids.setdefault(token.content, index) != index:
                raise TokenizerError(
                    f"{self._path.parent}: the added token {show(token.content)} has two ids, "
                    f"{ids[token.content]} and {index}; it needs exactly one"
                )
        return ids

    def _required_id(self, name: str) -> int:
        index = self.token_to_id(self.special_tokens.get(name, ""))
        if index is None:
            raise TokenizerError(
                f"{self._path.parent} asks for a {name} around every text (add_{name}), but names none that is "
                f"in the vocabulary"
            )
        return index

    def _is_special(self, content: str) -> bool:
        index = self._id_of(content)
        return content in self._special or (index < self._model_size and bool(self._model.is_control(index)))

    def _id_of(self, content: str) -> int:
        """The id of a token at which texts are split."""
        index = self.token_to_id(content)
        assert index is not None
        return index

    def _segments(self, text: str, split_at: re.Pattern[str]) -> Iterator[str | int]:
        """A text split at added tokens: their ids, and the strings between them that are not empty."""
        start = 0
        while found := split_at.search(text, start):
            token = self._split_at[found.group()]
            before = text[start : found.start()]
            before = before.rstrip() if token.lstrip else before
            if before:
                yield before
            yield self._id_of(token.content)
            start = found.end()
            while token.rstrip and start < len(text) and text[start].isspace():
                start += 1
        if start < len(text):
            yield text[start:]


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Finds the first of the tokens in a text; of several that start there, the longest."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    alternatives = (
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in longest_first
    )
    return re.compile("|".join(alternatives) or r"(?!)")
