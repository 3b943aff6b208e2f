"""DecoderStages: the `decoder` of a tokenizer.json, taken apart so that it can run on a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from streamllm.tokenizer.backend import REPLACE_EACH_BYTE, byte_fallback
from streamllm.tokenizer.errors import TokenizerError


class DecoderStages:
    """The stages of a decoder in three groups: on single tokens, from tokens to bytes, on the decoded text.

    For example, Llama-2's `[Replace "▁" " ", ByteFallback, Fuse, Strip " " left 1]` becomes: Replace on each
    token; the bytes of byte tokens; drop one leading space of the text. The library itself runs the first
    group, token by token.

    Raises:
        TokenizerError: a stage needs the whole text.
    """

    def __init__(self, path: Path, decoder: Any) -> None:
        self.utf8_errors = "replace"
        self._edits: list[Callable[[], Callable[[str], str]]] = []  # each makes a function for a new text
        self._to_bytes: Callable[[str], bytes] = str.encode
        # Without a decoder, the library puts a space between two tokens.
        self._spaced = decoder is None
        self._on_token: Any = None  # the library's decoder with the first group of stages
        stages = [] if decoder is None else list(_flatten(json.loads(decoder.__getstate__())))
        token_stages: list[dict[str, Any]] = []
        # What the next stage gets: "tokens", "bytes" (the bounds of tokens are lost) or "text" (one string).
        level = "tokens"
        for stage in stages:
            kind = stage["type"]
            if kind == "Fuse":
                level = "text"
            elif level == "tokens" and kind in ("Replace", "Strip", "Metaspace", "WordPiece"):
                token_stages.append(stage)
            elif level == "tokens" and kind == "ByteLevel":
                level, self._to_bytes = "text", _byte_level
            elif level == "tokens" and kind == "ByteFallback":
                level, self._to_bytes, self.utf8_errors = "bytes", byte_fallback, REPLACE_EACH_BYTE
            elif level == "text" and kind == "Strip" and stage["stop"] == 0:
                self._edits.append(partial(_DropLeading, stage["content"], stage["start"]))
            elif level != "tokens" and kind == "Replace" and len(stage["pattern"].get("String", "")) == 1:
                old, new = stage["pattern"]["String"], stage["content"]
                self._edits.append(partial(partial, _replace, old, new))
            else:
                names = " > ".join(str(each["type"]) for each in stages)
                raise TokenizerError(
                    f"{path}: the decoder {names} cannot run on a stream, because of {kind}; allowed are "
                    f"Metaspace, WordPiece, Replace and Strip on single tokens, then ByteLevel or ByteFallback "
                    f"or neither, then Fuse, then Strip on the left"
                )
        if token_stages:
            self._on_token = tokenizers.decoders.Fuse()
            self._on_token.__setstate__(json.dumps({"type": "Sequence", "decoders": token_stages}).encode())

    def token_bytes(self, token: str) -> tuple[bytes, bytes]:
        """The bytes of a token at the start of a text, and elsewhere."""
        at_start = elsewhere = token
        if self._spaced:
            elsewhere = " " + token
        elif self._on_token is not None:
            at_start = self._on_token.decode([token])
            # Metaspace and WordPiece decode the first token differently, so an empty one comes first here.
            elsewhere = self._on_token.decode(["", token])
        return self._to_bytes(at_start), self._to_bytes(elsewhere)

    def edits(self) -> list[Callable[[str], str]]:
        """The edits of a new text. Each is called with the next piece of the text and returns it edited."""
        return [new_edit() for new_edit in self._edits]


def _flatten(stage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if stage["type"] == "Sequence":
        for inner in stage["decoders"]:
            yield from _flatten(inner)
    else:
        yield stage


class _DropLeading:
    """Removes a character up to `count` times from the start of a text that comes in pieces."""

    def __init__(self, character: str, count: int) -> None:
        self._character = character
        self._left = count

    def __call__(self, piece: str) -> str:
        while self._left and piece:
            if piece[0] != self._character:
                self._left = 0
                break
            piece = piece[1:]
            self._left -= 1
        return piece


def _replace(old: str, new: str, piece: str) -> str:
    return piece.replace(old, new)


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token, which is stored as plain text
        return token.encode()


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet, which writes each byte as one printable character.

    The printable characters of Latin-1 stand for their own bytes. The characters from U+0100 on stand for the
    68 other bytes, in order: the space is "Ġ".
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _bytes_of_characters()
