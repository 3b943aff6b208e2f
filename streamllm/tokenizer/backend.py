"""Backend: what a tokenizer library must provide, and what both libraries share."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol


class TokenBytes(NamedTuple):
    """What one token adds to a text."""

    at_start: bytes  # if the token is the first of the text
    elsewhere: bytes
    ends_start: bool  # False: the token that follows counts as the first, too
    special: bool


class Backend(Protocol):
    """A tokenizer of one library."""

    file: str  # the name of its file
    vocab_size: int
    utf8_errors: str  # how bytes that are not UTF-8 are decoded: the `errors` argument of `bytes.decode`
    special_ends_bytes: bool  # whether bytes before and after a skipped special token cannot form a character
    table: dict[int, TokenBytes]  # the tokens that `token_bytes` was called for
    before: list[int]  # the ids that the files put in front of every text: BOS, or none
    after: list[int]  # the ids that the files put behind every text: EOS, or none
    added_ids: Collection[int]  # the ids of the tokens at which a text is split before it is encoded
    special_contents: Collection[str]  # the special tokens as a text spells them
    prefix_behind_added: bool  # whether the text behind an added token gets the prefix of a text's start, too

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_piece(self, text: str, prefix: bool, special_tokens: bool) -> list[int]:
        """The ids of a part of a text.

        Args:
            prefix: begin with the prefix of a text's start (Llama: a space).
            special_tokens: special tokens that are written in the text become their ids.
        """
        ...

    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token: int) -> str | None: ...
    def token_bytes(self, token: int) -> TokenBytes | None: ...
    def edits(self) -> list[Callable[[str], str]]:
        """New functions that edit the decoded text, piece by piece; they may hold a state."""
        ...


# Bytes that are not UTF-8. Python and ByteLevel tokenizers ("replace") write one U+FFFD for each incomplete
# character. sentencepiece, and tokenizers with ByteFallback, write one U+FFFD for each byte.
REPLACE_EACH_BYTE = "streamllm.replace_each_byte"
codecs.register_error(
    REPLACE_EACH_BYTE,
    lambda error: ("\ufffd" * (error.end - error.start), error.end),  # type: ignore[attr-defined]
)

_BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # Rust reads "+F" as the number 15


def byte_fallback(token: str) -> bytes:
    """The bytes of a token in a vocabulary with byte tokens: "<0x41>" is b"A"."""
    return bytes([int(token[3:5], 16)]) if _BYTE_TOKEN.fullmatch(token) else token.encode()


def is_encodable(text: str) -> bool:
    """Whether the text has no half of a surrogate pair. JSON can spell one, but the libraries refuse it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
