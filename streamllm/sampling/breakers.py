"""The sequences of tokens that interrupt a repetition for DRY, from strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamllm.tokenizer import Tokenizer

# As in llama.cpp and text-generation-webui.
DEFAULT_BREAKERS = ("\n", ":", '"', "*")


def breaker_tokens(
    tokenizer: Tokenizer | None, breakers: Sequence[str | tuple[int, ...]] | None
) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell the breakers, as llama.cpp finds them.

    A token whose text contains a string breaks on its own. So does a token whose text ends with the beginning of a
    string, together with the tokens of the rest. A breaker that is a sequence of ids stays as it is. None: `"\\n"`,
    `":"`, `'"'` and `"*"`; without a tokenizer, nothing. Every token of the vocabulary is looked at, so call it once
    for a stream.

    Raises ValueError for a string without a tokenizer.
    """
    if breakers is None:
        breakers = () if tokenizer is None else DEFAULT_BREAKERS
    found = {breaker for breaker in breakers if not isinstance(breaker, str)}
    strings = [breaker for breaker in breakers if isinstance(breaker, str)]
    if not strings:
        return tuple(sorted(found))
    if tokenizer is None:
        raise ValueError(
            f"dry_sequence_breakers names the string {strings[0]!r}, which takes a tokenizer: "
            f"give token ids, [[13], [25]], or generate with a Stream"
        )
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token], skip_special_tokens=False)
        for string in strings:
            if string in text:
                found.add((token,))
                continue
            for length in range(1, min(len(string) - 1, len(text)) + 1):
                if text.endswith(string[:length]):
                    found.add((token, *_continuation(tokenizer, string[length:])))
    return tuple(sorted(found))


def _continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text` inside a text. Some tokenizers put a space in front of the first word."""
    line = tokenizer.encode("\n", add_special_tokens=False)
    whole = tokenizer.encode("\n" + text, add_special_tokens=False)
    if whole[: len(line)] == line:
        return whole[len(line) :]
    return tokenizer.encode(text, add_special_tokens=False)
