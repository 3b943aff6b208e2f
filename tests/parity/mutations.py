"""Mutations: functions that patch the library so that it reads a checkpoint wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamllm.models import alibi, attention, base, falcon, gpt_neox, llama, rotary
from streamllm.models.alibi import Alibi
from streamllm.weights.checkpoint import Checkpoint, checkpoint, shards
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import Fused, Target

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
ABSENT = object()  # among the values of `keys`


def change_families(patch: Patch, change: Callable[[Any], Any]) -> None:
    """Replace every Family by change(family)."""
    changed = {model_type: change(family) for model_type, family in checkpoint.FAMILIES.items()}
    patch.setattr(checkpoint, "FAMILIES", changed)


def config(**changes: Any) -> Mutation:
    """The Config with other fields: values, or functions of the Config."""

    def changed(config: Any) -> Any:
        values = {name: value(config) if callable(value) else value for name, value in changes.items()}
        return replace(config, **values)

    return lambda patch: change_families(
        patch, lambda family: replace(family, read=lambda keys, match: changed(family.read(keys, match)))
    )


def keys(**changes: Any) -> Mutation:
    """config.json with other keys; a key whose value is ABSENT is removed."""

    def changed(given: ConfigReader) -> ConfigReader:
        values = {**given._values, **changes}
        return ConfigReader({name: value for name, value in values.items() if value is not ABSENT})

    return lambda patch: change_families(
        patch, lambda family: replace(family, read=lambda given, match: family.read(changed(given), match))
    )


def rope(**changes: Any) -> Mutation:
    """The Rope with other fields."""
    return config(rope=lambda config: replace(config.rope, **changes))


def tensors(changed: Callable[[Target], Target]) -> Mutation:
    """The table of tensors with changed targets."""
    return lambda patch: change_families(
        patch,
        lambda family: replace(
            family, tensors={theirs: changed(ours) for theirs, ours in family.tensors.items()}
        ),
    )


def swapped(one: str, other: str) -> Mutation:
    """Two of our names exchanged in the table of tensors."""

    def changed(target: Target) -> Target:
        if isinstance(target, Fused):
            return replace(target, names=tuple(changed(name) for name in target.names))
        return target.replace(one, "@").replace(other, one).replace("@", other)

    return tensors(changed)


def split(wrong: Callable[[Tensor, Any], tuple[Tensor, ...]]) -> Mutation:
    """Fused queries, keys and values, split in another way."""
    return tensors(lambda target: replace(target, split=wrong) if isinstance(target, Fused) else target)


def without(name: str) -> Mutation:
    """Parameters whose name here contains `name` have no effect: biases become 0, weights of norms 1."""

    def mutation(patch: Patch) -> None:
        load = Checkpoint.load

        def load_without(self: Checkpoint, *args: Any, **named: Any) -> torch.nn.Module:
            model = load(self, *args, **named)
            found = [parameter for ours, parameter in model.named_parameters() if name in ours]
            assert found
            for parameter in found:
                parameter.data = torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)
            return model

        patch.setattr(Checkpoint, "load", load_without)

    return mutation


def blocks(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    """All queries, all keys, all values."""
    kv_heads = getattr(config, "kv_heads", config.heads)
    return fused.split([heads * config.head_dim for heads in (config.heads, kv_heads, kv_heads)])


def interleaved(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    """q, k, v of each head in turn."""
    heads = fused.unflatten(0, (config.heads, 3, config.head_dim))
    return tuple(part.flatten(0, 1) for part in heads.unbind(1))


def keys_before_queries(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    """k and v of each group, then its queries."""
    G, D = config.kv_heads, config.head_dim
    groups = fused.unflatten(0, (G, -1, D))
    return groups[:, 2:].flatten(0, 2), groups[:, 0].flatten(0, 1), groups[:, 1].flatten(0, 1)


def rows_interleaved(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    """q, k, v row by row."""
    return fused.unflatten(0, (-1, 3)).unbind(1)


def rotated_by(turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Mutation:
    """Another function in place of the one that rotates queries and keys."""
    return lambda patch: patch.setattr(rotary, "_rotate", lambda x, table: turn(x, *table))


def last_dimensions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the last dimensions instead of the first."""
    return TURN(x.flip(-1), cos, sin).flip(-1)


def adjacent_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates dimensions 2i and 2i + 1 together, instead of i and i + half."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
    return TURN(pairs, cos, sin).unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)


ROTATE = rotary._rotate


def TURN(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ROTATE(x, (cos, sin))


def frequencies(wrong: Callable[[rotary.Rope, int], Tensor]) -> Mutation:
    """Other rotary frequencies."""

    def changed(rope: rotary.Rope, span: int, device: torch.device) -> Tensor:
        return wrong(rope, span).double()

    return lambda patch: patch.setattr(rotary, "_frequencies", changed)


def groups_interleaved(module: Any) -> Mutation:
    """Query head j reads key head j % G instead of j // (H / G)."""

    def wrong(
        query: Tensor, sink_query: Tensor | None, keys: Tensor, values: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        H, G = query.shape[1], keys.shape[1]
        order = torch.arange(H).view(H // G, G).t().flatten()
        back = order.argsort()
        return attention.attend(query[:, order], None, keys, values, *rest, **named)[:, back]

    return lambda patch: patch.setattr(module, "attend", wrong)


def scaled(module: Any, factor: float) -> Mutation:
    """The position bias multiplied by `factor`."""
    right = module.position_bias

    def wrong(*args: Any, **named: Any) -> Tensor:
        return factor * right(*args, **named)

    return lambda patch: patch.setattr(module, "position_bias", wrong)


def slopes(wrong: Callable[[Alibi], list[float]]) -> Mutation:
    """Other slopes of ALiBi."""
    return lambda patch: patch.setattr(alibi, "_slopes", lambda given, device: torch.tensor(wrong(given)))


def evenly(given: Alibi) -> list[float]:
    """As if the number of heads were a power of two."""
    return [2 ** (-given.bias_max * (i + 1) / given.heads) for i in range(given.heads)]


def in_order(given: Alibi) -> list[float]:
    """Sorted, steepest first."""
    return sorted(given.slopes().tolist(), reverse=True)


def between_first(given: Alibi) -> list[float]:
    """The two runs of slopes in the wrong order: slopes[0::2] of the next power of two before slopes[1::2]."""
    n = 1 << (given.heads - 1).bit_length()
    every = [2 ** (-given.bias_max * (i + 1) / n) for i in range(n)]
    return (every[0::2] + every[1::2])[: given.heads]


def activation(name: str) -> Mutation:
    return config(activation=name)


def head_is_embedding(patch: Patch) -> None:
    """The head is the embedding, although the file has a head."""
    load = Checkpoint.load

    def tied(self: Checkpoint, *args: Any, **named: Any) -> torch.nn.Module:
        model = load(self, *args, **named)
        model.head.weight = model.embed.weight
        return model

    patch.setattr(Checkpoint, "load", tied)


def another_file(name: str) -> Mutation:
    """The weights are read from a file that no index names."""

    def mutation(patch: Patch) -> None:
        patch.setattr(shards, "INDEX", "no.json")
        patch.setattr(shards, "SINGLE", name)

    return mutation


def mlp_reads(wrong: Callable[[Any, Tensor, Tensor], Tensor]) -> Mutation:
    """The parallel block of GPT-NeoX with another input of the MLP: wrong(block, x, normed x)."""

    def forward(self: Any, x: Tensor, step: Any, rotation: Any, store: Any) -> Tensor:
        normed = self.attention_norm(x)
        read = self.attention(normed, step, rotation, store)
        return self.mlp(wrong(self, x, normed)) + read + x

    return lambda patch: patch.setattr(gpt_neox.Block, "forward", forward)


def heads_normed_after_rotation(patch: Patch) -> None:
    """Queries and keys are rotated first, and normed afterwards."""

    def forward(self: Any, x: Tensor, step: Any, rotation: Any, store: Any) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        query, _ = rotation.queries(q)
        keys, values = store.append(self.k_norm(rotation.keys(k)), v)
        read = attention.attend(self.q_norm(query), None, keys, values, step, scale=self.head_dim**-0.5)
        return self.o(read.transpose(1, 2).flatten(2))

    patch.setattr(llama.Attention, "forward", forward)


def scale_of_width_by_heads(patch: Patch) -> None:
    """Scores are scaled by 1/sqrt(C / H), although head_dim is not C / H."""

    def wrong(query: Tensor, *rest: Any, scale: float) -> Tensor:
        return attention.attend(query, *rest, scale=(64 / query.shape[1]) ** -0.5)

    patch.setattr(llama, "attend", wrong)


def activation_of_relu_is_silu(patch: Patch) -> None:
    patch.setitem(base.ACTIVATIONS, "relu", base.ACTIVATIONS["silu"])


def slow_positions(rope: Any, span: int) -> Tensor:
    """Without the factor of linear scaling."""
    return rotary.Rope(rope.theta, rope.dim).frequencies(span)


def interpolated(rope: Any, span: int) -> Tensor:
    """Every frequency divided by the factor, also the high ones."""
    return slow_positions(rope, span) / rope.factor


def stored_table(rope: Any, span: int) -> Tensor:
    """The rotary table that old files contain."""
    return torch.full((math.ceil(rope.dim / 2),), 0.5)


def rounded(rope: Any, span: int) -> Tensor:
    """Frequencies rounded to bfloat16."""
    return rope.frequencies(span).bfloat16().float()


def other_list(rope: Any, span: int) -> Tensor:
    """The long list of longrope in place of the short one, and the other way round."""
    return replace(rope, short_factor=rope.long_factor, long_factor=rope.short_factor).frequencies(span)


def rotation_and_alibi(patch: Patch) -> None:
    """Falcon's attention with both encodings of positions."""

    def forward(self: Any, x: Tensor, step: Any, position: Tensor, store: Any) -> Tensor:
        rotation = rotary.rotation(rotary.Rope(10000.0, self.head_dim), step, x.dtype)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        query, _ = rotation.queries(q)
        keys, values = store.append(rotation.keys(k), v)
        read = attention.attend(query, None, keys, values, step, self.head_dim**-0.5, bias=position)
        return self.o(read.transpose(1, 2).flatten(2))

    patch.setattr(falcon.Attention, "forward", forward)
