"""JsonBackend: a `tokenizer.json`, run by the tokenizers library."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from streamllm.tokenizer.backend import TokenBytes, is_encodable
from streamllm.tokenizer.errors import TokenizerError
from streamllm.tokenizer.json_decoder import DecoderStages
from streamllm.tokenizer.json_limits import check_limits
from streamllm.tokenizer.json_stages import normalizer_of_piece, pre_tokenizer_of_piece, prefix_behind_added
from streamllm.tokenizer.special_tokens import STANDARD_NAMES, AddedToken
from streamllm.weights.errors import shorten, show

T = TypeVar("T")

# Texts that show which ids a post-processor adds: one of them has a token in any vocabulary.
_PROBES = ("a", "0", ".", " ", "\n", "A", "the")
# The name of an object or list with an ASCII letter written as \\u00XX. It would hide from `_without_vocabulary`.
_ESCAPED_KEY = re.compile(r'"\w*\\u00[4-7][0-9a-fA-F](?:\w|\\u00)*"\s*:\s*[\[{]')


class JsonBackend:
    """A `tokenizer.json`. Its post-processor decides about BOS and EOS.

    The tokens of the other files are added as transformers 5 adds them: what is one id there is one id here.

    Args:
        path: for messages.
        source: the text of the file.
        added: the added tokens of the other files, by id.
        named: the special tokens that the other files name, by name (`bos_token` …).
        extra: special tokens without a name.
    """

    file = "tokenizer.json"
    special_ends_bytes = False

    def __init__(
        self,
        path: Path,
        source: str,
        added: Mapping[int, AddedToken],
        named: Mapping[str, AddedToken],
        extra: Iterable[AddedToken],
    ) -> None:
        self._path = path
        if _ESCAPED_KEY.search(source):
            raise TokenizerError(f"{path} spells a key with escaped letters, which no tokenizer writes")
        check_limits(path, _without_vocabulary(source))
        with _quiet_panics():
            self._load(source, added, named, extra)

    def _load(
        self,
        source: str,
        added: Mapping[int, AddedToken],
        named: Mapping[str, AddedToken],
        extra: Iterable[AddedToken],
    ) -> None:
        path = self._path
        self._tokenizer = _call_library(
            partial(tokenizers.Tokenizer.from_str, source),
            f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} can load",
        )
        # Settings of a training run, which are saved in the file; they would cut and pad every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _check_ids(path, self._tokenizer.get_vocab(with_added_tokens=True), _added_ids(source))
        new = _new_tokens(self._tokenizer.get_added_tokens_decoder(), added, named, extra)
        if new:
            _call_library(partial(self._tokenizer.add_tokens, new), f"{path.parent}: the added tokens fail")
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _check_companions(path, vocabulary, added)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size == 0:
            raise TokenizerError(f"{path}: the vocabulary is empty")
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.added_ids: Collection[int] = self._added.keys()
        self.special_contents: Collection[str] = [
            token.content for token in self._added.values() if token.special
        ]
        self.table: dict[int, TokenBytes] = {}
        self._decoder = DecoderStages(path, self._tokenizer.decoder)
        self.utf8_errors = self._decoder.utf8_errors
        self._normalizer = _state(self._tokenizer.normalizer)
        self._pre_tokenizer = _state(self._tokenizer.pre_tokenizer)
        self.prefix_behind_added = prefix_behind_added(self._normalizer, self._pre_tokenizer)
        self._variants: dict[tuple[bool, bool], Any] = {}
        self.before, self.after = self._added_by_post_processor()
        for index in (*self.before, *self.after):
            if index >= self.vocab_size:
                raise TokenizerError(
                    f"{path}: its post_processor adds id {index} to every text, and the vocabulary ends at "
                    f"{self.vocab_size - 1}"
                )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._encode(self._tokenizer, text, add_special_tokens).ids
        return ids

    def encode_piece(self, text: str, prefix: bool, special_tokens: bool) -> list[int]:
        encoding = self._encode(self._variant(prefix, special_tokens), text, False)
        ids: list[int] = encoding.ids
        if prefix or not self.prefix_behind_added:
            return ids
        # Without the prefix up to the first added token, with it from there on.
        first = next((i for i, token in enumerate(ids) if token in self._added), None)
        if first is None:
            return ids
        prefixed = self._encode(self._variant(True, special_tokens), text, False)
        same = next((i for i, token in enumerate(prefixed.ids) if token in self._added), None)
        if same is None or prefixed.offsets[same] != encoding.offsets[first]:
            return ids
        return [*ids[:first], *prefixed.ids[same:]]

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token) if is_encodable(token) else None
        return found

    def id_to_token(self, token: int) -> str | None:
        if token in self._added:
            return str(self._added[token].content)
        found: str | None = self._tokenizer.id_to_token(token)
        return found

    def token_bytes(self, token: int) -> TokenBytes | None:
        # The library names a normalised token by its normalised text, "▁<s>", which is how a text spells it. A special
        # token is not part of the text, so it has its own name.
        is_special = token in self._added and self._added[token].special
        name = self.id_to_token(token) if is_special else self._tokenizer.id_to_token(token)
        if name is None:
            return None
        at_start, elsewhere = _call_library(
            partial(self._decoder.token_bytes, name), f"the decoder of {self._path} fails on token {token}"
        )
        return TokenBytes(at_start, elsewhere, True, is_special)

    def edits(self) -> list[Callable[[str], str]]:
        return self._decoder.edits()

    def _encode(self, tokenizer: Any, text: str, add_special_tokens: bool) -> Any:
        text.encode("utf-8")  # raises for half of a surrogate pair; the library would call it a wrong type
        encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return _call_library(encode, f"the rules of {self._path} fail on this text")

    def _variant(self, prefix: bool, special_tokens: bool) -> Any:
        """A tokenizer for a part of a text. It shares the vocabulary with the whole text's tokenizer."""
        if (prefix, special_tokens) in self._variants:
            return self._variants[prefix, special_tokens]
        normalizer = normalizer_of_piece(self._normalizer, prefix)
        pre_tokenizer = pre_tokenizer_of_piece(self._pre_tokenizer, prefix)
        variant = self._tokenizer
        if not special_tokens or (normalizer, pre_tokenizer) != (self._normalizer, self._pre_tokenizer):
            variant = tokenizers.Tokenizer(self._tokenizer.model)
            if normalizer is not None:
                variant.normalizer = _restore(tokenizers.normalizers.Sequence([]), normalizer)
            if pre_tokenizer is not None:
                variant.pre_tokenizer = _restore(tokenizers.pre_tokenizers.Sequence([]), pre_tokenizer)
            tokens = [token for _, token in sorted(self._added.items())]
            if not special_tokens:
                # `encode_special_tokens` does not act on special tokens that are normalised.
                tokens = [_added_token(token, False, True) if token.special else token for token in tokens]
                variant.encode_special_tokens = True
            variant.add_tokens(tokens)
            assert variant.get_added_tokens_decoder().keys() == self._added.keys()
        self._variants[prefix, special_tokens] = variant
        return variant

    def _added_by_post_processor(self) -> tuple[list[int], list[int]]:
        """The ids in front of a text and behind it."""
        for probe in _PROBES:
            encoding = self._encode(self._tokenizer, probe, True)
            inside = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
            if inside:
                return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]
        return [], []


def _state(stage: Any) -> dict[str, Any] | None:
    """A stage of the library as the JSON object in its file."""
    return None if stage is None else json.loads(stage.__getstate__())


def _restore(empty: Any, state: dict[str, Any]) -> Any:
    """The reverse of `_state`. `empty` is any stage of the same kind."""
    empty.__setstate__(json.dumps(state).encode())
    return empty


def _added_token(token: Any, normalized: bool, special: bool) -> Any:
    """The library's token like `token`, of ours or of the library."""
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=normalized,
        special=special,
    )


def _new_tokens(
    present: Mapping[int, Any],
    added: Mapping[int, AddedToken],
    named: Mapping[str, AddedToken],
    extra: Iterable[AddedToken],
) -> list[Any]:
    """What the other files add to a tokenizer.json, in transformers' order.

    A token of the other files replaces the flags of a token in tokenizer.json. A token with one of the standard
    names is special.
    """
    theirs = {token.content: token for token in present.values()}
    by_content = {token.content: _for_library(token) for _, token in sorted(added.items())}
    for name, token in named.items():
        content = token.content
        if not is_encodable(content):
            continue
        found = by_content.get(content, theirs.get(content))
        if found is None or (name in STANDARD_NAMES and not found.special):
            flags = _for_library(token) if found is None else found
            by_content[content] = tokenizers.AddedToken(
                content,
                single_word=flags.single_word,
                lstrip=flags.lstrip,
                rstrip=flags.rstrip,
                normalized=flags.normalized,
                special=True,
            )
    for token in extra:
        if is_encodable(token.content) and token.content not in by_content and token.content not in theirs:
            by_content[token.content] = _for_library(token)
    return [token for content, token in by_content.items() if repr(token) != repr(theirs.get(content))]


def _for_library(token: AddedToken) -> Any:
    normalized = not token.special if token.normalized is None else token.normalized
    return _added_token(token, normalized, token.special)


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


def _without_vocabulary(source: str) -> dict[str, Any]:
    """The stages of a tokenizer.json, {} where they are not JSON. Its vocabulary is long and is not parsed."""
    stages: dict[str, Any] = {}
    decoder = json.JSONDecoder()
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for found in re.finditer(rf'"{name}"\s*:\s*(?=[\[{{])', source):
            with contextlib.suppress(ValueError, RecursionError):
                stages.setdefault(name, []).append(decoder.raw_decode(source, found.end())[0])
    return stages


@contextlib.contextmanager
def _quiet_panics() -> Iterator[None]:
    """Holds back what the library writes to standard error, and drops it if the library panics.

    A panic prints its place in the Rust code before Python can catch it.
    """
    try:
        sys.stderr.flush()
        real = os.dup(2)
    except (OSError, ValueError, AttributeError):  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except TokenizerError:
            held.seek(0, os.SEEK_END)
            held.truncate(0)
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            if text := held.read():
                os.write(2, text)


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


def _check_companions(path: Path, vocabulary: dict[str, int], added: Mapping[int, AddedToken]) -> None:
    """Raises TokenizerError if another file gives a token an id that it does not have in tokenizer.json."""
    for index, token in added.items():
        found = vocabulary.get(token.content)
        if found != index:
            raise TokenizerError(
                f"{path.parent}: the added token {show(token.content)} has id {index} in tokenizer_config.json "
                f"or added_tokens.json, but {found} in {path.name}; both must give it the same id"
            )
