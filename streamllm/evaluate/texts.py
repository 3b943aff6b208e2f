"""Texts as token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamllm.tokenizer import Tokenizer


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer adds in front of every text (BOS, or none)."""
    return tokenizer.encode_piece("")


def as_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """One stream, int64 [N]: BOS once at its start, EOS after every text, where the tokenizer has them."""
    ids, end = beginning(tokenizer), tokenizer.eos_token_id
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        ids += [] if end is None else [end]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def as_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """Each text alone, with its own BOS. Texts of fewer than two tokens are left out."""
    return [tokens for text in texts if len(tokens := as_stream(tokenizer, [text])) > 1]


def first_tokens(texts: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first `count` tokens of all texts together, without a last piece of a single token."""
    kept, left = [], count
    for text in texts:
        if left > 1:
            kept.append(text[:left])
        left -= len(text)
    return kept


def samples(tokenizer: Tokenizer, stream: Tensor, count: int, length: int, seed: int = 0) -> Tensor:
    """`count` random parts of a stream [N], each with its own BOS in front: int64 [count, length].

    Raises ValueError for a stream shorter than `length`.
    """
    first = torch.tensor(beginning(tokenizer), dtype=torch.int64, device="cpu")
    body = length - len(first)
    if body < 1 or len(stream) < length:
        raise ValueError(f"{len(stream)} tokens are too few for samples of {length}: give a longer text")
    generator = torch.Generator("cpu").manual_seed(seed)
    starts = torch.randint(
        len(first), len(stream) - body + 1, (count,), generator=generator, dtype=torch.int64, device="cpu"
    )
    return torch.stack([torch.cat((first, stream[start : start + body])) for start in starts.tolist()])
