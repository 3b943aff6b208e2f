"""score: how likely a model finds texts, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from streamllm.cache import SinkCache
from streamllm.evaluate.predictions import new_cache, scored_texts
from streamllm.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Score:
    """The log-probabilities of the tokens of a text, in nats.

    tokens: the ids that are scored. The first token of a text has no score where the tokenizer puts no BOS token
    in front of it. logprobs: of each of them, given all before it. is_greedy: whether each is the most likely token.
    """

    tokens: list[int]
    logprobs: list[float]
    is_greedy: list[bool]

    @property
    def total(self) -> float:
        """The log-probability of the text."""
        return sum(self.logprobs)


def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str | tuple[str, str]],
    *,
    sinks: int = 4,
    window: int | None = None,
    batch: int = 8,
    chunk: int = 256,
) -> list[Score]:
    """How likely the model finds each text, or each continuation of a pair (context, continuation).

    Each is a stream of its own, of any length; `batch` of them are read together, `chunk` tokens of each at once. A
    continuation is encoded as the text that follows its context. A token scores -inf, with a warning, where the
    model's logits are not finite. Raises ValueError for a text without a token to predict.
    """
    whole, counts = [], []
    for number, text in enumerate(texts):
        context, rest = ("", text) if isinstance(text, str) else text
        before = tokenizer.encode_piece(context)
        after = before[-1] if context and before else None
        ids = tokenizer.encode_piece(rest, bos=False, continuation=bool(context), after=after)
        count = len(ids) - (not before)
        if count < 1:
            raise ValueError(f"text {number} has no token that could be predicted: give a longer one")
        whole.append([*before, *ids])
        counts.append(count)

    def cache(rows: int, length: int) -> SinkCache:
        return new_cache(model, "sinks", sinks, window, chunk, rows)

    scored = scored_texts(model, whole, cache, batch, chunk)
    return [
        Score(ids[-count:], (-nats[-count:]).tolist(), hits[-count:].tolist())
        for ids, count, (nats, hits) in zip(whole, counts, scored, strict=True)
    ]
