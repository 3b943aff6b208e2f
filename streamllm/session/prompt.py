"""The token ids of a prompt, in which special tokens that a message spells stay text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamllm.session.dialogue import Message
from streamllm.tokenizer import Tokenizer

PRIVATE_USE = range(0xE000, 0xF8FF)  # characters without a meaning of their own


class Spelled:
    """Special tokens that messages spell, and a character for each of them while a template renders the messages."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        self._tokenizer = tokenizer
        special = sorted(tokenizer.special_spellings, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        found = set[str]()
        used = set[str]()
        for text in _texts(messages):
            if self._special is not None:
                found.update(self._special.findall(text))
            used.update(character for character in text if ord(character) in PRIVATE_USE)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        self._characters = dict(zip(sorted(found), free, strict=False))
        self._tokens = {character: token for token, character in self._characters.items()}

    def hide(self, value: Any) -> Any:
        """A message in which characters stand for the special tokens."""
        if not self._characters:
            return value
        if isinstance(value, str):
            assert self._special is not None
            return self._special.sub(lambda match: self._characters[match.group()], value)
        if isinstance(value, Mapping):
            return {name: inner if name == "role" else self.hide(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(inner) for inner in value]
        return value

    def reveal(self, text: str) -> str:
        """A rendering, with the special tokens as the messages spell them."""
        return "".join(self._tokens.get(character, character) for character in text)

    def encode(self, text: str, *, bos: bool | None, continuation: bool, after: int | None) -> list[int]:
        """The ids of a rendering. Only those special tokens that the template writes become their ids."""
        ids = list[int]()
        for part in self._parts(text):
            plain = any(character in self._tokens for character in part)
            ids += self._tokenizer.encode_piece(
                self.reveal(part) if plain else part,
                bos=bos if not ids else False,
                continuation=continuation or bool(ids),
                after=ids[-1] if ids else after,
                special_tokens=not plain,
            )
        return ids

    def _parts(self, text: str) -> list[str]:
        """The text, cut at special tokens around each stretch that spells one."""
        if self._special is None or not any(character in self._tokens for character in text):
            return [text]
        parts, whole = list[str](), ""
        for stretch in re.split(f"({self._special.pattern})", text):
            if any(character in self._tokens for character in stretch):
                parts += [whole] if whole else []
                parts.append(stretch)
                whole = ""
            else:
                whole += stretch
        return [*parts, whole] if whole or not parts else parts


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for name, inner in value.items() if name != "role" for text in _texts(inner)]
    if isinstance(value, (list, tuple)):
        return [text for inner in value for text in _texts(inner)]
    return []
