"""The special and added tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from streamllm.tokenizer.backend import is_encodable
from streamllm.tokenizer.errors import TokenizerError
from streamllm.weights.errors import show

STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKEN_ID = 2**31 - 1


class AddedToken(NamedTuple):
    """A token that is found in a text before the tokenizer's rules are applied to the rest."""

    content: str
    special: bool = False
    lstrip: bool = False  # the token includes the white space on its left
    rstrip: bool = False
    single_word: bool = False  # only where no letter or digit is next to it
    normalized: bool | None = None  # found in the normalised text; None: unless it is special


def named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens that have a name: `bos_token` and others that a model defines (`image_token`)."""
    found = dict(config)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= extra
    tokens: dict[str, AddedToken] = {}
    for name, value in found.items():
        is_token = name in STANDARD_NAMES or (name.endswith("_token") and isinstance(value, (str, dict)))
        if value is not None and is_token:
            token = _read_token(folder, name, value, special=True)
            if token.content:  # in some files, "" stands for none
                tokens[name] = token
    return tokens


def extra_tokens(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """The special tokens without a name."""
    tokens = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(name) or []
        if isinstance(values, list):
            tokens += [_read_token(folder, name, value, special=True) for value in values]
    return [token for token in tokens if token.content]


def read_added_tokens_file(path: Path, values: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """The added tokens of added_tokens.json by id. `special` holds the contents of the special ones."""
    tokens: dict[int, AddedToken] = {}
    for content, index in values.items():
        tokens[_checked_id(path, content, index, tokens)] = AddedToken(content, special=content in special)
    return tokens


def read_added_tokens_decoder(folder: Path, entries: Any) -> dict[int, AddedToken]:
    """The added tokens of `added_tokens_decoder` in tokenizer_config.json by id."""
    path = folder / "tokenizer_config.json"
    if not isinstance(entries, dict):
        raise TokenizerError(
            f"{path}: added_tokens_decoder is {show(entries)}; it must be an object of ids and tokens"
        )
    tokens: dict[int, AddedToken] = {}
    for key, value in entries.items():
        token = _read_token(folder, f"added_tokens_decoder[{show(key)}]", value, special=False)
        index = int(key) if re.fullmatch(r"[0-9]{1,12}", key) else key
        tokens[_checked_id(path, token.content, index, tokens)] = token
    return tokens


def _checked_id(path: Path, content: str, index: Any, taken: Mapping[int, AddedToken]) -> int:
    is_id = isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= MAX_TOKEN_ID
    if not is_id or not content or not is_encodable(content):
        raise TokenizerError(
            f"{path}: the added token {show(content)} has id {show(index)}; a token must be valid text and not "
            f"empty, an id a whole number from 0 to {MAX_TOKEN_ID}"
        )
    if index in taken:
        raise TokenizerError(
            f"{path}: id {index} belongs to two added tokens, {show(taken[index].content)} and "
            f"{show(content)}; each needs an id of its own"
        )
    return int(index)


def _read_token(folder: Path, name: str, value: Any, special: bool) -> AddedToken:
    """A token as the files write it: a string, or an object with its content and flags."""
    if isinstance(value, str):
        return AddedToken(value, special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")}
        normalized = value.get("normalized")
        return AddedToken(
            value["content"],
            special or value.get("special") is True,
            **flags,
            normalized=normalized if isinstance(normalized, bool) else None,
        )
    raise TokenizerError(
        f"{folder}: {name} in the tokenizer's configuration is {show(value)}; it must be a string, or an "
        f"object with a content"
    )
