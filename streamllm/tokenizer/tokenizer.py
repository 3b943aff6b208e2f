"""Tokenizer: text to token ids, ids to text, and prompts from chat messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamllm.chat import Message, render
from streamllm.generation_config import attached
from streamllm.tokenizer.backend import Backend
from streamllm.tokenizer.decoder import IncrementalDecoder
from streamllm.tokenizer.errors import TokenizerError


class Tokenizer:
    """Text to token ids and back. `load_tokenizer_files` makes one.

    Attributes:
        special_tokens: the named special tokens, for example `{"bos_token": "<s>", "eos_token": "</s>"}`.
        chat_template: the jinja2 template that makes a prompt from messages, or several by name, or None.
        ignored_flags: `add_bos_token` or `add_eos_token`, where tokenizer_config.json asks for a token that `encode`
            does not add. transformers 4 adds it for some classes, transformers 5 does not; see `adds_bos`.
        folder: where its files are, if `load_tokenizer_files` made it.
        vocab_size: the largest id that it can decode, plus one. A model's vocabulary is often padded beyond
            it; larger ids decode to nothing.
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
        self.ignored_flags: tuple[str, ...] = ()
        self.folder: Path | None = None
        self._before, self._after = backend.before, backend.after

    def __repr__(self) -> str:
        named = "".join(
            f", {short} {self.special_tokens[name]!r}"
            for short, name in (("bos", "bos_token"), ("eos", "eos_token"))
            if name in self.special_tokens
        )
        return f"Tokenizer({self._backend.file}, {self.vocab_size} ids{named})"

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, None if the tokenizer names none."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, None if the tokenizer names none."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, None if the tokenizer names none."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, None if the tokenizer names none.

        Generation stops at the ids that the model's own files name, if they name any; see `eos_token_ids`.
        """
        return self._named_id("eos_token")

    def eos_token_ids(self, model: Any) -> list[int]:
        """The ids at which the model's files end a text, and the tokenizer's own: for the argument `eos` of a call.

        Some checkpoints name different ones: the model's files the end of a document, the tokenizer's that of an
        answer. Generation stops at the model's alone, unless it is given others.
        """
        ids = [*attached(model).eos, self.eos_token_id]
        return list(dict.fromkeys(index for index in ids if index is not None))

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it (`"</s>"`, `"▁the"`), None if there is none."""
        return self._backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """The token of an id as the vocabulary spells it, None if there is none."""
        return self._backend.id_to_token(index) if 0 <= index < self.vocab_size else None

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True
    ) -> dict[str, list[int] | list[list[int]]]:
        """`{"input_ids": ids}` of a text, or of each of several texts; see `encode` and `encode_batch`."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}
        return {"input_ids": self.encode_batch(text, add_special_tokens=add_special_tokens)}

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The token ids of each text; see `encode`."""
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode_batch(self, batch: Iterable[Iterable[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of ids; see `decode`."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts BOS in front of a text. The tokenizer's files decide, unless you set it."""
        return self.bos_token_id in self._before

    @adds_bos.setter
    def adds_bos(self, value: bool) -> None:
        without = [token for token in self._before if token != self.bos_token_id]
        self._before = [self._required_id("bos_token"), *without] if value else without

    @property
    def adds_eos(self) -> bool:
        """Whether `encode` puts EOS behind a text. The tokenizer's files decide, unless you set it."""
        return self.eos_token_id in self._after

    @adds_eos.setter
    def adds_eos(self, value: bool) -> None:
        without = [token for token in self._after if token != self.eos_token_id]
        self._after = [*without, self._required_id("eos_token")] if value else without

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a whole text, as transformers encodes it. For a stream, see `encode_piece`.

        Args:
            add_special_tokens: add the tokens that the tokenizer puts around a text (Llama: BOS in front).
                Special tokens that are written in the text become their ids in any case.

        Raises:
            TokenizerError: the text contains half of a surrogate pair, or the tokenizer's rules fail on it.
            TypeError: the text is not a str.
        """
        self._check_text(text, "encode")
        files_decide = (self._before, self._after) == (self._backend.before, self._backend.after)
        ids = self._backend.encode(text, add_special_tokens and files_decide)
        return [*self._before, *ids, *self._after] if add_special_tokens and not files_decide else ids

    def encode_piece(
        self,
        text: str,
        *,
        bos: bool | None = None,
        continuation: bool = False,
        after: int | None = None,
        special_tokens: bool = True,
    ) -> list[int]:
        """The token ids of the next piece of a stream.

        The pieces of a text have the ids of the whole text, up to merges across the cuts: the prefix space (Llama)
        and BOS come once, at the start. EOS is not added, because the stream goes on.

        Args:
            bos: put BOS in front, unless the text begins with it. None: at the start of a stream, what the
                tokenizer's files put in front of a text; else nothing.
            continuation: the text does not begin the stream, so it gets no prefix space.
            after: the last id of the stream, if it is known. Older Llama tokenizers put the prefix space behind
                each special token, too.
            special_tokens: special tokens that are written in the text become their ids. With False they are
                ordinary text, as text of a user should be. (Added tokens that are not special become their ids in any
                case.)

        Raises:
            TokenizerError: as `encode`; or `bos` is true and the tokenizer has no BOS.
            TypeError: the text is not a str.
        """
        self._check_text(text, "encode_piece")
        behind_added = self._backend.prefix_behind_added and after in self._backend.added_ids
        ids = self._backend.encode_piece(text, not continuation or behind_added, special_tokens)
        if not special_tokens and any(map(self._is_special, ids)):
            ids = self._encode_special_as_text(text, not continuation or behind_added)
        if bos is None:
            front = [] if continuation else self._before
        else:
            front = [self._required_id("bos_token")] if bos else []
        return ids if ids[: len(front)] == front else [*front, *ids]

    def _encode_special_as_text(self, text: str, prefix: bool) -> list[int]:
        """Cuts special tokens in the text in two, where the vocabulary finds them in ordinary text, too."""
        special = "|".join(map(re.escape, self.special_spellings))
        cuts = [found.start() + 1 for found in re.finditer(f"(?={special})", text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        first, *rest = (
            self._backend.encode_piece(part, prefix and index == 0, False) for index, part in enumerate(parts)
        )
        return sum(rest, first)

    def special_text(self, token: int) -> str | None:
        """A special token as a text spells it, None for an ordinary token."""
        return self._backend.id_to_token(token) if self._is_special(token) else None

    @property
    def special_spellings(self) -> list[str]:
        """All special tokens as a text spells them, also those without a name in `special_tokens`."""
        return list(filter(None, self._backend.special_contents))

    def _is_special(self, token: int) -> bool:
        found = self._backend.token_bytes(token)
        return found is not None and found.special

    def _check_text(self, text: object, method: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"{method}() takes a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text contains half of a surrogate pair (U+{ord(text[error.start]):04X} at index "
                f"{error.start}), which no tokenizer can encode; remove it, for example with "
                f"text.encode(errors='replace').decode()"
            ) from None

    def _required_id(self, name: str) -> int:
        index = self._named_id(name)
        if index is None:
            raise TokenizerError(
                f"this tokenizer has no {name}: its files name none that is in the vocabulary"
            )
        return index

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids: what an `IncrementalDecoder` returns for them.

        It equals the library's own decoding except in one case: a run of byte tokens (`<0xE2>`) in which some
        form whole characters and others do not. Here, as in sentencepiece, the whole characters are kept and
        each other byte becomes one U+FFFD. The tokenizers library replaces the whole run, which a stream
        cannot do: it has printed the first characters already.

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
        """The prompt that the chat template makes from messages, as text; see `streamllm.chat.render`.

        Args:
            messages: for example `[{"role": "user", "content": "Hello"}]`.
            chat_template: a template to use instead of the tokenizer's own.
            add_generation_prompt: end the prompt with the tokens that begin the model's answer.
            variables: `tools`, `documents`, `limits`, `continue_final_message`, and variables of the template
                (`enable_thinking=False`).

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
        """The prompt that the chat template makes from messages, as token ids.

        It takes the arguments of `render_chat_template`. No BOS is added, because templates write it.

        Raises:
            ChatTemplateError: there is no template, or it does not render these messages.
        """
        return self.encode(self.render_chat_template(messages, **options), add_special_tokens=False)
