"""Log-probabilities of chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLogProbs:
    """A token, its natural log-probability, and the likeliest tokens with theirs, the best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class LogProbs:
    """The log-probabilities of B tokens, on the device: `rows` waits for it."""

    tokens: Tensor  # int64 [B]
    values: Tensor  # float32 [B]
    top_tokens: Tensor  # int64 [B, n]
    top_values: Tensor  # float32 [B, n]

    def rows(self) -> list[TokenLogProbs]:
        """The same on the host."""
        return [
            TokenLogProbs(token, value, tuple(zip(top_tokens, top_values, strict=True)))
            for token, value, top_tokens, top_values in zip(
                self.tokens.tolist(),
                self.values.tolist(),
                self.top_tokens.tolist(),
                self.top_values.tolist(),
                strict=True,
            )
        ]


def token_logprobs(logits: Tensor, tokens: Tensor, top_logprobs: int = 0) -> LogProbs:
    """The log-probabilities of `tokens`, int64 [B], and of the likeliest `top_logprobs` tokens, under logits [B, V].

    Give the logits as the model returned them: the numbers are then those of the model, before penalties,
    temperature and truncation (as vLLM's default, `raw_logprobs`), so a token that sampling would never draw has one,
    too. They are computed in float32.

    Raises ValueError for a negative `top_logprobs`, or for more than there are tokens.
    """
    if not 0 <= top_logprobs <= logits.shape[-1]:
        raise ValueError(
            f"top_logprobs must be in 0 … {logits.shape[-1]}, the size of the vocabulary, not {top_logprobs}"
        )
    wide = logits.float()
    total = wide.logsumexp(-1, keepdim=True)
    top_values, top_tokens = (
        wide.topk(top_logprobs) if top_logprobs else (wide[:, :0], tokens.new_empty(len(wide), 0))
    )
    return LogProbs(tokens, (wide.gather(-1, tokens[:, None]) - total)[:, 0], top_tokens, top_values - total)
