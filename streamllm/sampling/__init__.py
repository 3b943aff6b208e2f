"""From logits to the next token: penalties over the last tokens of a stream, truncation, and the draw.

`sample` does it all, for one stream or many. `History` is what a stream remembers for it.
"""

from streamllm.sampling.breakers import breaker_tokens
from streamllm.sampling.edits import Edits, apply_edits
from streamllm.sampling.history import History
from streamllm.sampling.logprobs import LogProbs, TokenLogProbs, token_logprobs
from streamllm.sampling.random_numbers import fresh_seed, uniform
from streamllm.sampling.rows import RowSettings, check_finite, choose_rows
from streamllm.sampling.sampler import LogitsProcessor, Sampler, sample

__all__ = [
    "Edits",
    "History",
    "LogProbs",
    "LogitsProcessor",
    "RowSettings",
    "Sampler",
    "TokenLogProbs",
    "apply_edits",
    "breaker_tokens",
    "check_finite",
    "choose_rows",
    "fresh_seed",
    "sample",
    "token_logprobs",
    "uniform",
]
