"""IncrementalDecoder: token ids to text, one token at a time.

With both libraries, decoding comes down to the same four steps:

    id  ->  bytes of the token              from a table; the first token of a text may have other bytes
        ->  joined, decoded as UTF-8        up to 3 bytes wait for the rest of their character
        ->  edits of the start of the text  for example, Llama drops one leading space
        ->  text

So a stream keeps a few bytes and a flag, however long it is. `Tokenizer.decode` uses the same code, so its text
equals the text that a stream prints piece by piece.
"""

from __future__ import annotations

import codecs
import operator

from streamllm.tokenizer.backend import Backend, TokenBytes
from streamllm.tokenizer.errors import TokenizerError


class IncrementalDecoder:
    """Turns token ids into text, as far as whole characters go.

    The pieces joined equal `Tokenizer.decode` of the same ids. At most three bytes (the beginning of a
    character) are held back, and nothing else is kept, so a stream may be endless.

    To continue a text, push its ids first and ignore the text that is returned: whether a leading space
    belongs to the new text depends on the tokens before it.
    """

    __slots__ = ("_at_start", "_backend", "_edits", "_errors", "_held", "_skip_special", "_table")

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._table = backend.table
        self._skip_special = skip_special_tokens
        self._errors = backend.utf8_errors
        self._edits = backend.edits()
        self._at_start = True
        self._held = b""

    def push(self, token: int) -> str:
        """The text that one more token completes, often `""`."""
        token = operator.index(token)
        found = self._table.get(token) or self._token_bytes(token)
        if found is None:
            return ""
        if self._skip_special and found.special:
            return self.flush() if self._backend.special_ends_bytes else ""
        if self._at_start:
            data = self._held + found.at_start
            self._at_start = not found.ends_start
        else:
            data = self._held + found.elsewhere
        return self._decode(data, final=False)

    def flush(self) -> str:
        """The text of the bytes that are held back: U+FFFD for the beginning of a character.

        The decoder can be used further. It stands in the middle of its text, not at the start of a new one.
        """
        return self._decode(self._held, final=True)

    def _decode(self, data: bytes, final: bool) -> str:
        text, used = codecs.utf_8_decode(data, self._errors, final)
        self._held = data[used:]
        for edit in self._edits:
            text = edit(text)
        return text

    def _token_bytes(self, token: int) -> TokenBytes | None:
        if token < 0:
            raise TokenizerError(f"token id {token} is negative: ids are 0 and larger")
        if token >= self._backend.vocab_size:
            return None
        found = self._backend.token_bytes(token)
        if found is not None:
            self._table[token] = found
        return found
