"""Text to token ids and back: one face over tokenizers (tokenizer.json) and sentencepiece (tokenizer.model).

Neither transformers nor protobuf is needed. The files are made by strangers: whatever is wrong with one of
them ends in a `TokenizerError` that says what and where.

**Decoding is incremental, and only incremental.** `Tokenizer.decode` is a loop over
`IncrementalDecoder.push`, so text that is printed as it comes and text that is decoded at the end cannot
differ. What makes it possible is that every decoder of a language model's tokenizer comes down to the same
four steps, whichever library runs it:

    id  ->  bytes of the token           a row of a table; the first token of a text may have its own
        ->  joined, read as UTF-8        at most 3 bytes wait here for the rest of their character
        ->  edits of the text's start    Llama's "drop one leading space": once, at the start of the text only
        ->  text

So a stream keeps a few bytes and a flag, however long it runs.
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import sentencepiece
import tokenizers

from streamllm.chat import Message, render

#: Every file that `load_tokenizer_files` may read, the needed ones first. Of `tokenizer.json` and
#: `tokenizer.model` one is enough.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)

_SPACE = "\u2581"  # what sentencepiece, and those who follow it, write for a space
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

T = TypeVar("T")


class TokenizerError(ValueError):
    """A tokenizer's file, or a text or id given to it, is not usable: which, what is allowed, what to do."""


class Tokenizer:
    """Text to token ids and back, made by `load_tokenizer_files`.

    Attributes:
        special_tokens: the named special tokens, for example `{"bos_token": "<s>", "eos_token": "</s>"}`.
        chat_template: the jinja2 source that makes a prompt of messages, or several by name, or None.
        vocab_size: one more than the largest id that it can decode. A model's vocabulary is often padded
            beyond it; ids from there on decode to nothing.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str],
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.vocab_size = backend.vocab_size

    def __repr__(self) -> str:
        named = "".join(
            f", {name[:3]} {self.special_tokens[name]!r}"
            for name in _NAMES[:2]
            if name in self.special_tokens
        )
        return f"Tokenizer({self._backend.file}, {self.vocab_size} ids{named})"

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, None where the tokenizer names none."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, None where the tokenizer names none. (Generation listens to the model's
        files first.)"""
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary (`"</s>"`, `"▁the"`), None if there is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            add_special_tokens: let the tokenizer put what it puts around a text (Llama: BOS in front).
                Special tokens spelled out in the text become their ids either way.

        Raises:
            TokenizerError: the text holds half of a surrogate pair, or the tokenizer's own rules fail on it.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode() takes a str, not {type(text).__name__}")
        try:
            return self._backend.encode(text, add_special_tokens)
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text holds half of a surrogate pair (U+{ord(text[error.start]):04X} at index "
                f"{error.start}), which no tokenizer reads; encode it with errors='replace' then decode it"
            ) from None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, by definition what an `IncrementalDecoder` prints for them.

        It equals the library's own decoding but for one case: where byte tokens (`<0xE2>`) that form whole
        characters and others that do not follow each other directly. There the whole characters are kept and
        every byte that belongs to none becomes one U+FFFD, as sentencepiece does it; the tokenizers library
        makes U+FFFD of all of them, back to the first, which a stream has long printed.

        Raises:
            TokenizerError: an id is negative.
        """
        decoder = self.decoder(skip_special_tokens=skip_special_tokens)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def decoder(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A new incremental decoder, at the start of a text."""
        return IncrementalDecoder(self._backend, skip_special_tokens)

    def render_chat_template(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt that the chat template makes of messages, as text; see `streamllm.chat.render`.

        Args:
            messages: for example `[{"role": "user", "content": "Hello"}]`.
            chat_template: a template to use instead of the tokenizer's own.
            add_generation_prompt: end with what opens the model's answer.
            variables: `tools`, `documents`, `limits`, and what the template knows (`enable_thinking=False`).

        Raises:
            ChatTemplateError: there is no template, or it does not render these messages.
        """
        return render(
            self.chat_template if chat_template is None else chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            **variables,
        )

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The prompt that the chat template makes of messages, as token ids.

        Takes what `render_chat_template` takes. No BOS is added: a template writes its own.

        Raises:
            ChatTemplateError: there is no template, or it does not render these messages.
        """
        return self.encode(self.render_chat_template(messages, **options), add_special_tokens=False)


class IncrementalDecoder:
    """Token ids in, text out, as far as whole characters go.

    The pieces joined equal `Tokenizer.decode` of the same ids, whatever the ids and wherever they are cut. At
    most three bytes (a character's beginning) are held back, and nothing else is kept, so a stream may run
    for ever.

    To continue a text, push its ids first and drop what comes out: whether a leading space belongs to the
    text depends on what stood before.
    """

    __slots__ = ("_at_start", "_backend", "_edits", "_errors", "_held", "_skip", "_table")

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._table = backend.table
        self._skip = skip_special_tokens
        self._errors = backend.utf8_errors
        self._edits = backend.edits()
        self._at_start = True
        self._held = b""

    def push(self, token: int) -> str:
        """The text that one more token completes, often `""`."""
        token = operator.index(token)
        row = self._table.get(token) or self._row(token)
        if row is None:
            return ""
        if self._skip and row.special:
            return self.flush() if self._backend.special_ends_bytes else ""
        if self._at_start:
            data = self._held + row.first
            self._at_start = not row.ends_start
        else:
            data = self._held + row.later
        return self._read(data, False)

    def flush(self) -> str:
        """What is held back, for no more of it comes: U+FFFD for the beginning of a character.

        The decoder can go on after that; it stands in the middle of its text, not at a new start.
        """
        return self._read(self._held, True)

    def _read(self, data: bytes, final: bool) -> str:
        text, used = codecs.utf_8_decode(data, self._errors, final)
        self._held = data[used:]
        for edit in self._edits:
            text = edit(text)
        return text

    def _row(self, token: int) -> Row | None:
        if token < 0:
            raise TokenizerError(f"token id {token}: ids are 0 and larger")
        if token >= self._backend.vocab_size:
            return None
        row = self._backend.row(token)
        if row is not None:
            self._table[token] = row
        return row


class Row(NamedTuple):
    """What one token adds to a text."""

    first: bytes  # where nothing stands before it
    later: bytes  # anywhere else
    ends_start: bool  # False: what follows still stands at the start
    special: bool


class Backend(Protocol):
    """What a tokenizer library must answer."""

    file: str
    vocab_size: int
    utf8_errors: str
    special_ends_bytes: bool  # whether bytes before and after a skipped special token cannot form a character
    table: dict[int, Row]  # rows already asked for

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def token_to_id(self, token: str) -> int | None: ...
    def row(self, token: int) -> Row | None: ...
    def edits(self) -> list[Callable[[str], str]]: ...


# What stands for bytes that are no UTF-8. ByteLevel tokenizers and Python say "replace": one U+FFFD for each
# beginning of a character that does not go on. Byte tokens say one U+FFFD for every byte, in sentencepiece as
# in tokenizers.
_EACH_BYTE = "streamllm.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]

_BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # "+F" because Rust reads it as 15


class _DropLeading:
    """Drops up to `count` times one character from the start of a text that comes in pieces."""

    def __init__(self, character: str, count: int) -> None:
        self.character = character
        self.left = count

    def __call__(self, text: str) -> str:
        while self.left and text:
            if text[0] != self.character:
                self.left = 0
                break
            text = text[1:]
            self.left -= 1
        return text


# --------------------------------------------------------------------------------------------- tokenizer.json


class JsonBackend:
    """A `tokenizer.json`, run by the tokenizers library; its post-processor decides about BOS and EOS."""

    file = "tokenizer.json"
    special_ends_bytes = False

    def __init__(self, path: Path) -> None:
        try:
            # Not through from_file: one reading, so that what is checked is what was loaded.
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        self._path = path
        self._tokenizer = _guarded(
            partial(tokenizers.Tokenizer.from_str, source),
            f"{path} is no tokenizer.json that tokenizers {tokenizers.__version__} can load",
        )
        # Both are settings of somebody's training run that travel in the file; they would cut and pad every
        # text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _check_ids(path, vocabulary, _added_ids(source))
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size == 0:
            raise TokenizerError(f"{path}: the vocabulary is empty")
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self.table: dict[int, Row] = {}
        self._plan = _DecoderPlan(path, self._tokenizer.decoder)
        self.utf8_errors = self._plan.utf8_errors

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")  # the library names a lone surrogate a wrong type
        encode = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        ids: list[int] = _guarded(encode, f"the rules of {self._path} fail on this text").ids
        return ids

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token) if _is_unicode(token) else None
        return found

    def row(self, token: int) -> Row | None:
        name = self._tokenizer.id_to_token(token) if token < 2**32 else None
        if name is None:
            return None
        first, later = _guarded(
            partial(self._plan.data, name), f"the decoder of {self._path} fails on token {token}"
        )
        return Row(first, later, True, name in self._special)

    def edits(self) -> list[Callable[[str], str]]:
        return self._plan.edits()


def _is_unicode(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which the libraries take for a wrong type."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class _DecoderPlan:
    """The `decoder` of a tokenizer.json, cut in three: what acts on one token, how bytes are read, what edits
    the text.

    Llama-2's `[Replace "▁" " ", ByteFallback, Fuse, Strip " " left 1]` becomes: Replace for one token; bytes
    of byte tokens; drop one leading space. The first part is run by the library itself, token by token.
    """

    def __init__(self, path: Path, decoder: Any) -> None:
        self.utf8_errors = "replace"
        self._edits: list[Callable[[], Callable[[str], str]]] = []
        self._bytes: Callable[[str], bytes] = str.encode
        self._spaced = decoder is None  # without a decoder the library puts a space between any two tokens
        self._alone: Any = None
        stages = [] if decoder is None else list(_flat(json.loads(decoder.__getstate__())))
        per_token: list[dict[str, Any]] = []
        level = "tokens"  # then "bytes": characters, bounds of tokens lost; then "text": fused into one
        for stage in stages:
            kind = stage["type"]
            if kind == "Fuse":
                level = "text"
            elif level == "tokens" and kind in ("Replace", "Strip", "Metaspace", "WordPiece"):
                per_token.append(stage)
            elif level == "tokens" and kind == "ByteLevel":
                level, self._bytes = "text", _byte_level
            elif level == "tokens" and kind == "ByteFallback":
                level, self._bytes, self.utf8_errors = "bytes", _byte_fallback, _EACH_BYTE
            elif level == "text" and kind == "Strip" and stage["stop"] == 0:
                self._edits.append(partial(_DropLeading, stage["content"], stage["start"]))
            elif level != "tokens" and kind == "Replace" and len(stage["pattern"].get("String", "")) == 1:
                old, new = stage["pattern"]["String"], stage["content"]
                self._edits.append(partial(partial, _replace, old, new))
            else:
                names = " > ".join(str(each["type"]) for each in stages)
                raise TokenizerError(
                    f"{path}: the decoder {names} cannot be run on a stream, because of {kind}; allowed are "
                    "Metaspace, WordPiece, Replace and Strip on single tokens, ByteLevel or ByteFallback or "
                    "neither, then Fuse, then Strip on the left"
                )
        if per_token:
            self._alone = tokenizers.decoders.Fuse()
            self._alone.__setstate__(json.dumps({"type": "Sequence", "decoders": per_token}).encode())

    def data(self, name: str) -> tuple[bytes, bytes]:
        """The bytes of a token at the start of a text, and anywhere else."""
        first = later = name
        if self._spaced:
            later = " " + name
        elif self._alone is not None:
            first = self._alone.decode([name])
            # Metaspace and WordPiece treat the first token in their own way; an empty one before it takes the
            # role.
            later = self._alone.decode(["", name])
        return self._bytes(first), self._bytes(later)

    def edits(self) -> list[Callable[[str], str]]:
        return [make() for make in self._edits]


def _flat(stage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if stage["type"] == "Sequence":
        for inner in stage["decoders"]:
            yield from _flat(inner)
    else:
        yield stage


def _replace(old: str, new: str, text: str) -> str:
    return text.replace(old, new)


def _byte_fallback(name: str) -> bytes:
    return bytes([int(name[3:5], 16)]) if _BYTE_TOKEN.fullmatch(name) else name.encode()


def _byte_level(name: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:  # an added token, written as it is
        return name.encode()


def _printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet, in which every byte is one printable character.

    Bytes that Latin-1 prints stand for themselves, the 68 others for the characters from U+0100 on, in order:
    " " is "Ġ".
    """
    themselves = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in themselves)
    return {chr(byte): byte for byte in themselves} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()


def _added_ids(source: str) -> dict[str, int]:
    """The ids that a tokenizer.json gives to its added tokens, which the library does not read (it counts
    on)."""
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', source)
    if found is None:
        return {}
    tokens, _ = json.JSONDecoder().raw_decode(source, found.end())
    return {token["content"]: token["id"] for token in tokens if token["content"]}


def _check_ids(path: Path, vocabulary: dict[str, int], added: dict[str, int]) -> None:
    """Refuses ids that mean two tokens: encoding and decoding would disagree without a word."""
    owner: dict[int, str] = {}
    for token, index in vocabulary.items():
        if owner.setdefault(index, token) != token:
            raise TokenizerError(
                f"{path}: id {index} belongs to two tokens, {_short(owner[index])} and {_short(token)}; "
                "each needs one of its own"
            )
    for token, index in added.items():
        if vocabulary.get(token) != index:
            holder = f"belongs to {_short(owner[index])}" if index in owner else "leaves a gap"
            raise TokenizerError(
                f"{path}: added_tokens gives id {index} to {_short(token)}, but that id {holder}; "
                "added tokens take the ids that follow the vocabulary"
            )


def _guarded(call: Callable[[], T], what: str) -> T:
    """Calls into the Rust library, where a broken file may even panic: that exception is no `Exception`."""
    try:
        return call()
    except Exception as error:
        raise TokenizerError(f"{what}: {_short(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {_short(error)}") from None


# -------------------------------------------------------------------------------------------- tokenizer.model


class AddedToken(NamedTuple):
    """A token that is cut out of a text before sentencepiece sees it."""

    content: str
    special: bool = False
    lstrip: bool = False  # takes the white space to its left with it
    rstrip: bool = False
    single_word: bool = False  # only where no letter or digit touches it


class SentencePieceBackend:
    """A `tokenizer.model`, run by sentencepiece itself, with its own normaliser.

    sentencepiece reads `"</s>"` in a text as characters, so a text is cut at added and special tokens first.

    Args:
        added: the tokens beside the model's own, by id.
        special: the special tokens that some file names, by what they are for (`bos_token` …).
        extra: further special tokens.
        add_bos: put BOS in front of every text; None: if the model has one. add_eos: EOS behind it.
        prefix: which segments between special tokens get the model's prefix space: "every", "first", "none".
    """

    file = "tokenizer.model"
    special_ends_bytes = True
    utf8_errors = _EACH_BYTE

    def __init__(
        self,
        path: Path,
        added: Mapping[int, AddedToken],
        special: Mapping[str, AddedToken],
        extra: Iterable[AddedToken],
        *,
        add_bos: bool | None,
        add_eos: bool,
        prefix: str,
    ) -> None:
        self._path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
            raise TokenizerError(
                f"{path} is a tiktoken vocabulary, not a sentencepiece model; "
                "put the tokenizer.json of the same model beside it"
            )
        self._pieces = self._rest = self._load(data)
        self._drops_space, self._drops_spaces = self._spaces(data)
        # Appended fields of a protobuf message win over earlier ones: normalizer_spec { add_dummy_prefix:
        # false }.
        unprefixed = self._load(data + b"\x1a\x02\x18\x00") if prefix != "every" else self._pieces
        self._first = unprefixed if prefix == "none" else self._pieces
        self._rest = unprefixed
        self._names = self._read_names()
        self._size = len(self._names)
        self._added = dict(added)
        self.vocab_size = max(self._size, 1 + max(self._added, default=-1))
        self._ids = self._check_added()
        self.table: dict[int, Row] = {}
        self.special_tokens = self._own_special() | {name: token.content for name, token in special.items()}
        declared = [*special.values(), *extra, *self._added.values()]
        self._special = {token.content for token in declared if token.special}
        cut = {content: AddedToken(content) for content in self._own_special().values()}
        cut |= {token.content: token for token in declared}
        self._cut = {
            content: token for content, token in cut.items() if self.token_to_id(content) is not None
        }
        self._pattern = _any_of(self._cut.values())
        if add_bos is None:
            add_bos = "bos_token" in self.special_tokens
        self._before = self._named_id("bos_token") if add_bos else []
        self._after = self._named_id("eos_token") if add_eos else []

    def _load(self, data: bytes) -> Any:
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(data)
        except Exception as error:
            raise TokenizerError(
                f"{self._path} is no model that sentencepiece {sentencepiece.__version__} can load: "
                f"{_short(error)}"
            ) from error
        return pieces

    def _read_names(self) -> list[str]:
        try:
            names: list[str] = self._pieces.id_to_piece(list(range(self._pieces.vocab_size())))
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{self._path} is damaged: one of its pieces is no text ({error})"
            ) from error
        return names

    def _spaces(self, data: bytes) -> tuple[bool, bool]:
        """Whether decoding drops one space, and all of them, at the start of a text (fields of
        sentencepiece_model.proto)."""
        prefix = collapse = 1
        try:
            for number, value in _fields(data):
                if number == 5 and any(inner == 2 and text for inner, text in _fields(value)):
                    raise TokenizerError(
                        f"{self._path} has a denormalizer, which rewrites decoded text as a whole; "
                        "a stream cannot do that"
                    )
                if number == 3:
                    for inner, flag in _fields(value):
                        prefix = flag if inner == 3 else prefix
                        collapse = flag if inner == 4 else collapse
        except (IndexError, TypeError) as error:
            raise TokenizerError(f"{self._path} is damaged: its fields do not fit into it") from error
        return bool(prefix or collapse), bool(collapse)

    def _own_special(self) -> dict[str, str]:
        pieces = self._pieces
        ids = {
            "bos_token": pieces.bos_id(),
            "eos_token": pieces.eos_id(),
            "unk_token": pieces.unk_id(),
            "pad_token": pieces.pad_id(),
        }
        return {name: self._names[index] for name, index in ids.items() if 0 <= index < self._size}

    def _check_added(self) -> dict[str, int]:
        ids: dict[str, int] = {}
        for index, token in self._added.items():
            if index < self._size and self._names[index] != token.content:
                raise TokenizerError(
                    f"{self._path.parent}: the added token {_short(token.content)} has id {index}, which is "
                    f"{_short(self._names[index])} in tokenizer.model; added tokens have ids above "
                    f"the model's, from {self._size} on"
                )
            if ids.setdefault(token.content, index) != index:
                raise TokenizerError(
                    f"{self._path.parent}: the added token {_short(token.content)} has two ids, "
                    f"{ids[token.content]} and {index}; it needs one"
                )
        return ids

    def _named_id(self, name: str) -> list[int]:
        index = self.token_to_id(self.special_tokens.get(name, ""))
        if index is None:
            raise TokenizerError(
                f"{self._path.parent} asks for a {name} around every text (add_{name}), "
                "but names none that is in the vocabulary"
            )
        return [index]

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        if not _is_unicode(token):
            return None
        index: int = self._pieces.piece_to_id(token)  # the id of <unk> for what it does not know
        return index if self._names[index] == token else None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")  # a lone surrogate: the caller's sentence is better than the library's
        ids = [*self._before] if add_special_tokens else []
        pieces = self._first
        for segment in self._segments(text):
            try:
                ids += [segment] if isinstance(segment, int) else pieces.encode(segment)
            except Exception as error:
                what = f"the rules of {self._path} fail on this text"
                raise TokenizerError(f"{what}: {_short(error)}") from error
            pieces = self._rest
        return ids + self._after if add_special_tokens else ids

    def _segments(self, text: str) -> Iterator[str | int]:
        """The text cut at added tokens: strings between them, never empty, and ids."""
        start = 0
        while found := self._pattern.search(text, start):
            token = self._cut[found.group()]
            before = text[start : found.start()]
            before = before.rstrip() if token.lstrip else before
            if before:
                yield before
            index = self.token_to_id(token.content)
            assert index is not None
            yield index
            start = found.end()
            while token.rstrip and start < len(text) and text[start].isspace():
                start += 1
        if start < len(text):
            yield text[start:]

    def row(self, token: int) -> Row | None:
        if token in self._added:
            added = self._added[token]
            content = added.content.encode()
            return Row(content, content, True, added.special)
        if token >= self._size:
            return None
        pieces = self._pieces
        name = self._names[token]
        if name in self._special or pieces.is_control(token):
            return Row(name.encode(), name.encode(), True, True)
        if pieces.is_byte(token):
            data = _byte_fallback(name)
            return Row(data, data, True, False)
        if pieces.is_unknown(token):
            surface = pieces.decode([token]).encode()
            return Row(surface, surface, bool(surface), False)
        later = name.replace(_SPACE, " ").encode()
        first = later[1:] if self._drops_space and name.startswith(_SPACE) else later
        return Row(first, later, bool(first) or (first != later and not self._drops_spaces), False)

    def edits(self) -> list[Callable[[str], str]]:
        return []


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Finds the leftmost of the tokens in a text, the longest of those that start there."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    alternatives = (
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in longest_first
    )
    return re.compile("|".join(alternatives) or r"(?!)")


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers as int, the rest as bytes.

    Raises:
        IndexError, TypeError: it is no such message.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte: int = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise IndexError("a number of more than 64 bits")

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise IndexError(f"wire type {wire}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if wire == 2 and size == 0:
            yield number, b""
            continue
        if position + size > len(message):
            raise IndexError("a field that ends behind the message")
        yield number, message[position : position + size]
        position += size


# ------------------------------------------------------------------------------------------------------ files


def load_tokenizer_files(folder: Path) -> Tokenizer:
    """The tokenizer whose files lie in a folder (`TOKENIZER_FILES`, as checkpoints on the Hugging Face hub
    have them).

    `tokenizer.json` is preferred; its post-processor alone decides about BOS and EOS. With `tokenizer.model`
    alone, `add_bos_token` and `add_eos_token` of tokenizer_config.json decide; where they are absent, BOS is
    added if the model has one and EOS is not: so were trained the Llama models that such files belong to.

    Raises:
        TokenizerError: no such file, or one of them is broken.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    # Newer writers put everything into tokenizer_config.json; what an older one left beside it is stale.
    legacy = config.get("added_tokens_decoder") is None
    if legacy:
        config |= _read_json(folder / "special_tokens_map.json")
    special = _named_tokens(folder, config)
    if (folder / "tokenizer.json").exists():
        json_backend = JsonBackend(folder / "tokenizer.json")
        names = {name: token.content for name, token in special.items()}
        return Tokenizer(json_backend, names, _chat_template(folder, config))
    if not (folder / "tokenizer.model").exists():
        raise _nothing_found(folder)
    extra = _extra_tokens(folder, config)
    if legacy:
        contents = {token.content for token in (*special.values(), *extra)}
        added = _added_of_file(folder / "added_tokens.json", contents)
    else:
        added = _added_of_config(folder, config["added_tokens_decoder"])
    only_first = "none" if _flag(folder, config, "add_prefix_space") is False else "first"
    backend = SentencePieceBackend(
        folder / "tokenizer.model",
        added,
        special,
        extra,
        add_bos=_flag(folder, config, "add_bos_token"),
        add_eos=_flag(folder, config, "add_eos_token") or False,
        prefix=only_first if _flag(folder, config, "legacy") is False else "every",
    )
    return Tokenizer(backend, backend.special_tokens, _chat_template(folder, config))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name. Files of their own win over tokenizer_config.json, all of it."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        found = {}
        for name, path in files.items():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{path} cannot be read: {error}") from error
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
        f"{folder}/tokenizer_config.json: chat_template is {_short(value)}; "
        "it must be a text, or a list of objects with a name and a template"
    )


def _nothing_found(folder: Path) -> TokenizerError:
    supported = "streamllm reads tokenizer.json (tokenizers) and tokenizer.model (sentencepiece)"
    others = [
        name
        for name in ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model")
        if (folder / name).exists()
    ]
    if not others:
        return TokenizerError(f"{folder} holds no tokenizer: {supported}; put one of them there")
    return TokenizerError(
        f"{folder} has only {' and '.join(others)} for a tokenizer; {supported}. "
        "Load it once with transformers' AutoTokenizer and save_pretrained() it: that writes tokenizer.json"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value


def _flag(folder: Path, config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise TokenizerError(
        f"{folder}/tokenizer_config.json: {name} is {_short(value)}; it must be true, false or absent"
    )


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens that have a name (`bos_token` …), those that some model invents (`image_token`)
    too."""
    found = dict(config)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= extra
    tokens: dict[str, AddedToken] = {}
    for name, value in found.items():
        standard = name in _NAMES
        if value is not None and (standard or (name.endswith("_token") and isinstance(value, (str, dict)))):
            token = _token(folder, name, value, True)
            if token.content:  # some files name "" to say "none"
                tokens[name] = token
    return tokens


def _extra_tokens(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    tokens = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(name) or []
        if isinstance(values, list):
            tokens += [_token(folder, name, value, True) for value in values]
    return [token for token in tokens if token.content]


def _added_of_file(path: Path, special: set[str]) -> dict[int, AddedToken]:
    tokens: dict[int, AddedToken] = {}
    for content, index in _read_json(path).items():
        tokens[_new_id(path, content, index, tokens)] = AddedToken(content, special=content in special)
    return tokens


def _added_of_config(folder: Path, entries: Any) -> dict[int, AddedToken]:
    path = folder / "tokenizer_config.json"
    if not isinstance(entries, dict):
        raise TokenizerError(
            f"{path}: added_tokens_decoder is {_short(entries)}; it must be an object of ids and tokens"
        )
    tokens: dict[int, AddedToken] = {}
    for key, value in entries.items():
        token = _token(folder, f"added_tokens_decoder[{key!r}]", value, False)
        index = int(key) if re.fullmatch(r"[0-9]{1,12}", key) else key
        tokens[_new_id(path, token.content, index, tokens)] = token
    return tokens


def _new_id(path: Path, content: str, index: Any, taken: Mapping[int, AddedToken]) -> int:
    if (
        not isinstance(index, int)
        or isinstance(index, bool)
        or not 0 <= index < 2**31
        or not content
        or not _is_unicode(content)
    ):
        raise TokenizerError(
            f"{path}: the added token {_short(content)} has id {_short(index)}; "
            "a token is some text, an id a number from 0 on"
        )
    if index in taken:
        raise TokenizerError(
            f"{path}: id {index} belongs to two added tokens, {_short(taken[index].content)} and "
            f"{_short(content)}; each needs one"
        )
    return index


def _token(folder: Path, name: str, value: Any, special: bool) -> AddedToken:
    """A token as tokenizer_config.json and special_tokens_map.json spell it: its text, or an object with
    flags."""
    if isinstance(value, str):
        return AddedToken(value, special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")}
        return AddedToken(value["content"], special or value.get("special") is True, **flags)
    raise TokenizerError(
        f"{folder}: {name} of the tokenizer's configuration is {_short(value)}; "
        "it must be a text or an object with a content"
    )


def _short(value: Any) -> str:
    """How a value out of a file, or a library's message, which may quote one, stands in an error: never at
    full length."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    return text if len(text) <= 120 else text[:120] + "…"
