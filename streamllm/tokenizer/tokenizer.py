"""Tokenizer: text to token ids, ids to text, and prompts from chat messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamllm.chat import Message, render
from streamllm.tokenizer.backend import Backend
from streamllm.tokenizer.decoder import IncrementalDecoder
from streamllm.tokenizer.errors import TokenizerError


class Tokenizer:
    """Text to token ids and back. `load_tokenizer_files` makes one.

    Attributes:
        special_tokens: the named special tokens, for example `{"bos_token": "<s>", "eos_token": "</s>"}`.
        chat_template: the jinja2 template that makes a prompt from messages, or several by name, or None.
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

    def __repr__(self) -> str:
        named = "".join(
            f", {short} {self.special_tokens[name]!r}"
            for short, name in (("bos", "bos_token"), ("eos", "eos_token"))
            if name in self.special_tokens
        )
        return f"Tokenizer({self._backend.file}, {self.vocab_size} ids{named})"

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, None if the tokenizer names none."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, None if the tokenizer names none.

        Generation stops at the ids that the model's own files name, if they name any.
        """
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it (`"</s>"`, `"▁the"`), None if there is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            add_special_tokens: add the tokens that the tokenizer puts around a text (Llama: BOS in front).
                Special tokens that are written in the text become their ids in any case.

        Raises:
            TokenizerError: the text contains half of a surrogate pair, or the tokenizer's rules fail on it.
            TypeError: the text is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode() takes a str, not {type(text).__name__}")
        try:
            return self._backend.encode(text, add_special_tokens)
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text contains half of a surrogate pair (U+{ord(text[error.start]):04X} at index "
                f"{error.start}), which no tokenizer can encode; remove it, for example with "
                f"text.encode(errors='replace').decode()"
            ) from None

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
            variables: `tools`, `documents`, `limits`, and variables of the template (`enable_thinking=False`).

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
