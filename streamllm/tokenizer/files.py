"""load_tokenizer_files(): a folder -> its Tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from streamllm.tokenizer.errors import TokenizerError
from streamllm.tokenizer.json_backend import JsonBackend
from streamllm.tokenizer.sentencepiece_backend import SentencePieceBackend
from streamllm.tokenizer.special_tokens import (
    extra_tokens,
    named_tokens,
    read_added_tokens_decoder,
    read_added_tokens_file,
)
from streamllm.tokenizer.tokenizer import Tokenizer
from streamllm.weights.errors import CheckpointError, show
from streamllm.weights.files import read_bytes, read_json, read_text
from streamllm.weights.source import Source
from streamllm.weights.source.folder import FolderSource

#: The files that `load_tokenizer_files` may read, besides those in TEMPLATE_FOLDER. One of the first two is required.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)
COMPANION_FILES = ("vocab.json", "merges.txt")  # read by slow tokenizers of transformers, not here
TEMPLATE_FOLDER = "additional_chat_templates"  # all its files *.jinja are read
# Files of other tokenizers, which are named in the error if a folder has nothing else.
UNSUPPORTED_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model")
MAX_TOKENIZER_BYTES = 256 << 20  # of tokenizer.json and tokenizer.model; Gemma's tokenizer.json has 33 MB

T = TypeVar("T")


def list_template_files(source: Source) -> list[str]:
    """The names of the chat templates in TEMPLATE_FOLDER. Raises what `Source.files_in` raises."""
    return [name for name in source.files_in(TEMPLATE_FOLDER) if name.endswith(".jinja")]


def files_of(tokenizer: Tokenizer) -> dict[str, Path]:
    """The files that a tokenizer was loaded from: name -> path. Raises ValueError where they are gone."""
    if tokenizer.folder is None or not tokenizer.folder.is_dir():
        raise ValueError(
            f"the files of the tokenizer are not in {tokenizer.folder} any more: load it again, or give None"
        )
    source = FolderSource(str(tokenizer.folder), tokenizer.folder)
    names = (*TOKENIZER_FILES, *COMPANION_FILES, *list_template_files(source))
    return {name: path for name in dict.fromkeys(names) if (path := source.find(name)) is not None}


def load_tokenizer_files(folder: Path) -> Tokenizer:
    """The tokenizer whose files (`TOKENIZER_FILES`) are in a folder.

    `tokenizer.json` is preferred. Its post-processor decides about BOS and EOS, as in transformers 5; with the
    class GPTNeoXTokenizer neither is added. (transformers 4 let `add_bos_token` of tokenizer_config.json decide for
    some classes: set `tokenizer.adds_bos`.) With `tokenizer.model` alone, `add_bos_token` and `add_eos_token`
    decide. If they are absent, BOS is added if the model has one, and EOS is not: that is how the Llama models with
    such files were trained.

    Raises:
        TokenizerError: there is no such file, or one of them is damaged.
    """
    folder = Path(folder)
    tokenizer = _read_tokenizer(folder)
    tokenizer.folder = folder
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    source = FolderSource(str(folder), folder)
    config = _read_optional_json(source, "tokenizer_config.json")
    # Newer writers put everything into tokenizer_config.json. Older files beside it may be out of date.
    is_legacy = config.get("added_tokens_decoder") is None
    if is_legacy:
        config |= _read_optional_json(source, "special_tokens_map.json")
    named, extra = named_tokens(folder, config), extra_tokens(folder, config)
    if is_legacy:
        special = {token.content for token in (*named.values(), *extra)}
        added_file = _read_optional_json(source, "added_tokens.json")
        added = read_added_tokens_file(folder / "added_tokens.json", added_file, special)
    else:
        added = read_added_tokens_decoder(folder, config["added_tokens_decoder"])
    path = _find(source, "tokenizer.json")
    if path is not None:
        text = _read(partial(read_text, max_bytes=MAX_TOKENIZER_BYTES), path)
        json_backend = JsonBackend(path, text, added, named, extra)
        names = {name: token.content for name, token in named.items()}
        tokenizer = Tokenizer(json_backend, names, _chat_template(source, folder, config))
        if str(config.get("tokenizer_class")).removesuffix("Fast") == "GPTNeoXTokenizer":
            # transformers' class of this name does not use the post-processor.
            tokenizer.adds_bos = tokenizer.adds_eos = False
        added_by_encode = {"add_bos_token": tokenizer.adds_bos, "add_eos_token": tokenizer.adds_eos}
        tokenizer.ignored_flags = tuple(
            flag for flag, is_added in added_by_encode.items() if config.get(flag) is True and not is_added
        )
        return tokenizer
    path = _find(source, "tokenizer.model")
    if path is None:
        raise _no_tokenizer(folder)
    prefix = "first" if _flag(folder, config, "legacy") is False else "every"
    if _flag(folder, config, "add_prefix_space") is False:
        prefix = "none"
    backend = SentencePieceBackend(
        path,
        _read(partial(read_bytes, max_bytes=MAX_TOKENIZER_BYTES), path),
        added,
        named,
        extra,
        add_bos=_flag(folder, config, "add_bos_token"),
        add_eos=_flag(folder, config, "add_eos_token") or False,
        prefix=prefix,
    )
    return Tokenizer(backend, backend.special_tokens, _chat_template(source, folder, config))


def _read(read: Callable[[Path], T], path: Path) -> T:
    """The content of a file, read by a function of `weights.files`. Raises TokenizerError."""
    try:
        return read(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def _find(source: FolderSource, name: str) -> Path | None:
    """The path of a file, None if there is none. Raises TokenizerError for a link that leaves the folder."""
    try:
        path = source.inside(name)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    return path if os.path.lexists(path) else None


def _read_optional_json(source: FolderSource, name: str) -> dict[str, Any]:
    """A JSON object, {} if there is no such file."""
    path = _find(source, name)
    return {} if path is None else _read(read_json, path)


def _chat_template(
    source: FolderSource, folder: Path, config: Mapping[str, Any]
) -> str | dict[str, str] | None:
    """The template, or several by name. If there are files of templates, tokenizer_config.json is ignored."""
    try:
        names = [*list_template_files(source), "chat_template.jinja"]
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    paths = [path for name in names if (path := _find(source, name)) is not None]
    files = {"default" if path.parent == folder else path.stem: path for path in paths}
    if files:
        found = {name: _read(read_text, path) for name, path in files.items()}
        return found["default"] if set(found) == {"default"} else found
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    named = value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {str(entry.get("name")): entry.get("template") for entry in value}
    if isinstance(named, dict) and named and all(isinstance(text, str) for text in named.values()):
        return named
    raise TokenizerError(
        f"{folder}/tokenizer_config.json: chat_template is {show(value)}; it must be a string, or a list of "
        f"objects with a name and a template"
    )


def _no_tokenizer(folder: Path) -> TokenizerError:
    supported = "streamllm reads tokenizer.json (tokenizers) and tokenizer.model (sentencepiece)"
    others = [name for name in UNSUPPORTED_FILES if (folder / name).exists()]
    if not others:
        return TokenizerError(f"{folder} holds no tokenizer: {supported}; put one of them there")
    return TokenizerError(
        f"{folder} has only {' and '.join(others)} for a tokenizer; {supported}. Load it once with "
        f"transformers' AutoTokenizer and call save_pretrained(), which writes a tokenizer.json"
    )


def _flag(folder: Path, config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise TokenizerError(
        f"{folder}/tokenizer_config.json: {name} is {show(value)}; it must be true, false or absent"
    )
