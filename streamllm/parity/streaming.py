"""Comparing a stream past eviction with its definition, in float64. transformers is not needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.loading import open_source
from streamllm.models.rotary import Rope
from streamllm.models.step import Plan, Step
from streamllm.parity.helpers import no_warnings, rope_of
from streamllm.parity.report import Report, Row
from streamllm.parity.text import tokens_to_compare
from streamllm.weights.checkpoint import Checkpoint

TOLERANCE = 1e-9  # largest difference, in units of the standard deviation of the logits


def compare_streaming(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    text: str | None = None,
    sinks: int = 4,
    window: int = 28,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Compare a stream far past eviction with its definition, in float64.

    The definition is computed as `logits_by_definition` says. The cache is compared with it token by token, in
    chunks, all at once, and far from the start of the text. They must agree up to 1e-9 of the standard
    deviation of the logits.

    Arguments and errors as for `compare`; transformers is not needed.
    """
    source = open_source(name, revision=revision)
    checkpoint = Checkpoint(source, allow_pickle=allow_pickle)
    ids, description = tokens_to_compare(source, checkpoint, text, 4 * (sinks + window), None)
    count = ids.shape[1]
    window = max(1, min(window, count // 2 - sinks))  # a short text needs a shorter window to evict anything
    say("loading in float64")
    model = checkpoint.load(torch.float64, device)
    report = Report(
        [
            (
                "streaming",
                f"{sinks} sinks and {window} recent tokens; eviction starts after {sinks + window} tokens",
            ),
            ("text", f"{count} {description}"),
            ("against", "the definition, token by token: every key rotated to its place in the cache"),
        ]
    )
    with torch.inference_mode(), no_warnings():
        say("computing the definition")
        expected = logits_by_definition(model, ids.to(device), sinks, window)
        deviation = expected.std().item()

        def add_row(what: str, chunk: int, origin: int = 0) -> None:
            say(f"streaming, {what}")
            cache = SinkCache(model, sinks=sinks, window=window, chunk=chunk, origin=origin)
            difference = (model(ids.to(device), cache) - expected).abs() / deviation
            report.rows.append(Row(what, count, difference.max().item(), difference.mean().item(), TOLERANCE))
            wrong = (~(difference[0] <= TOLERANCE)).any(-1).nonzero()
            if len(wrong):
                report.notes.append(
                    f"{what}: the first token that differs is {int(wrong[0])}, counted from 0"
                )

        add_row("token by token", 1)
        add_row("in chunks of 7", 7)
        add_row("all at once", count)
        add_row("after a billion tokens, in chunks of 7", 7, 10**9)
    return report


def logits_by_definition(model: nn.Module, ids: Tensor, sinks: int, window: int) -> Tensor:
    """The logits [1, T, V] of a stream by its definition, for ids int64 [1, T]: no ring, no slots, no chunks.

    Each token is computed alone. Every key that it sees is rotated anew, to its place in the cache.
    """
    geometry: Any = model.geometry
    rope = rope_of(model.config)
    kept = {own: sinks + (window if own is None else min(window, own)) for own in set(geometry.windows)}
    stores = [DefinitionStore(rope, sinks, kept[own]) for own in geometry.windows]
    logits = []
    for t in range(ids.shape[1]):
        steps = {own: _single_step(min(t + 1, total), total, ids.device) for own, total in kept.items()}
        logits.append(model.project(model.hidden(ids[:, t : t + 1], Plan(steps, stores))))  # type: ignore[operator]
    return torch.cat(logits, 1)


def _single_step(keys: int, span: int, device: torch.device) -> Step:
    """The Step of one token, the last of `keys` in the cache. Its own key is rotated by `DefinitionStore`."""
    places = torch.arange(keys, dtype=torch.int64, device=device)[None]
    here, nowhere = places[:, -1:], torch.zeros_like(places[:, -1:])
    # One sink, seen from the same place as the rest: only with sinks does a Step rotate keys and queries separately.
    return Step(
        slots=here,
        query_place=here,
        sink_query_place=here,
        new_key_place=nowhere,
        key_place=places,
        visible=None,
        sinks=1,
        rope_length=span,
    )


class DefinitionStore:
    """Keys and values of one layer by the definition: sinks and recent tokens in text order, keys unrotated."""

    def __init__(self, rope: Rope | None, sinks: int, total: int) -> None:
        self.rope, self.sinks, self.total = rope, sinks, total
        self.keys: list[Tensor] = []  # [B, G, 1, D] each
        self.values: list[Tensor] = []

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for held, new in ((self.keys, k), (self.values, v)):
            held.append(new)
            if len(held) > self.total:
                del held[self.sinks]
        return self._rotated(torch.cat(self.keys, 2)), torch.cat(self.values, 2)

    def _rotated(self, keys: Tensor) -> Tensor:
        """Each key rotated to its place in the cache. Dimension i and i + dim/2 are one complex number."""
        if self.rope is None:
            return keys
        inverse = self.rope.frequencies(self.total).to(keys)
        half = len(inverse)
        angles = (
            torch.arange(keys.shape[2], dtype=torch.int64, device="cpu").to(keys)[:, None] * inverse
        )  # [K, dim/2]
        rotated = torch.complex(keys[..., :half], keys[..., half : 2 * half])
        rotated = rotated * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((rotated.real, rotated.imag, keys[..., 2 * half :]), -1)
