"""Comparing logits with transformers, without eviction.

One model is in memory at a time: transformers computes its logits and the outputs of its layers and is
released before ours is loaded. Both are loaded once more, one after the other, only where they differ.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from streamllm.cache import SinkCache
from streamllm.loading import open_source
from streamllm.parity.helpers import free_memory, no_warnings
from streamllm.parity.locate import first_difference
from streamllm.parity.reference import (
    Outputs,
    Reference,
    import_transformers,
    longest_text,
    transformers_arguments,
)
from streamllm.parity.report import Report, Row
from streamllm.parity.text import tokens_to_compare
from streamllm.weights.checkpoint import Checkpoint
from streamllm.weights.errors import UnsupportedConfig
from streamllm.weights.source import Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 5e-5  # largest difference in float32, in units of the standard deviation of the logits
FLOAT32_ANGLES_EXACT_UP_TO = 64  # tokens up to which float32 angles keep the logits within TOLERANCE


def compare(
    ours: str | os.PathLike[str] | None = None,
    theirs: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    tokens: int = 600,
    text: str | None = None,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Compare the logits of a checkpoint here with those in transformers, without eviction.

    `ours` is a hub name, a folder, or None for the embedded checkpoint. `theirs` is the checkpoint that
    transformers loads, where it is not the same. The first `tokens` tokens of `text` are compared; None takes
    a built-in text, or random ids where the checkpoint has no tokenizer. dtype: float32, bfloat16 or float16.
    `say` is called with each step, in words.

    In float32 the logits must agree up to 5e-5 of their standard deviation: with `match_transformers=True` at
    any length, and in the default reading of the config up to 64 tokens, because transformers' float32 angles
    are too coarse beyond. In a half type, the mean difference must not exceed the mean difference of
    transformers in that type from transformers in float32.

    Raises ImportError where transformers is not installed, CheckpointError where either library cannot load
    the checkpoint, ValueError for other arguments out of range.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    version = import_transformers().__version__
    source = open_source(ours, revision=revision)
    checkpoint = Checkpoint(source, match_transformers=True, allow_pickle=allow_pickle)
    arguments = transformers_arguments(source, theirs)
    ids, description = tokens_to_compare(source, checkpoint, text, tokens, longest_text(checkpoint))
    reference = Reference(arguments, checkpoint, device, say)
    count = ids.shape[1]
    short = min(FLOAT32_ANGLES_EXACT_UP_TO, count)

    exact = reference.outputs(ids, torch.float32, short)
    half = None if dtype == "float32" else reference.outputs(ids, DTYPES[dtype], short, modules=False)
    family = f"{checkpoint.config_reader.get('model_type')}, {checkpoint.config.layers} layers"
    report = Report(
        [
            ("model", f"{source.name} ({family})"),
            ("text", f"{count} {description}"),
            ("against", f"transformers {version} ({reference.attention}), {dtype}, {device}"),
        ]
    )

    def add_row(what: str, logits: Tensor, limited: bool = True) -> None:
        report.rows.append(_row(what, logits, exact, half, limited))

    say("running it here, with match_transformers")
    model = checkpoint.load(DTYPES[dtype], device)
    with torch.inference_mode(), no_warnings():
        add_row("with match_transformers", model(ids.to(device)).float().cpu())
        cache = SinkCache(model, sinks=0, window=count, chunk=max(1, count // 3))
        add_row("the same through a cache, in chunks", model(ids.to(device), cache).float().cpu())
    del model, cache
    free_memory(checkpoint)
    matched = all(row.passed for row in report.rows)

    say("running it here, as the config says")
    default, deviations = _default_reading(source, checkpoint, allow_pickle)
    if default is not None:
        model = default.load(DTYPES[dtype], device)
        with torch.inference_mode():
            add_row("as the config says", model(ids[:, :short].to(device)).float().cpu(), not deviations)
            if count > short:
                add_row("as the config says", model(ids.to(device)).float().cpu(), False)
        del model
        free_memory(checkpoint)
    report.notes += [f"as the config says: {deviation}" for deviation in deviations]
    report.refused = default is None

    if not all(row.passed for row in report.rows):
        say("looking for the first difference")
        chosen = checkpoint if not matched or default is None else default
        length = count if not matched else short
        report.difference = first_difference(reference, chosen, ids[:, :length], exact[length], device)
        if report.difference is None:
            report.notes.append(
                f"in float32 every layer agrees: the difference is the rounding in {dtype}"
                if dtype != "float32"
                else "no layer stands out: the difference grows slowly from layer to layer"
            )
    return report


def _row(
    what: str, logits: Tensor, exact: dict[int, Outputs], half: dict[int, Outputs] | None, limited: bool
) -> Row:
    """The difference of our logits [1, T, V] from transformers' in the same type.

    exact: transformers' outputs in float32, by length; half: in the half type, None where float32 is compared.
    """
    length = logits.shape[1]
    expected = (exact if half is None else half)[length].logits
    deviation = expected.std().item()
    difference = (logits - expected).abs() / deviation
    limit = TOLERANCE
    if half is not None:
        limit = (expected - exact[length].logits).abs().mean().item() / deviation
    maximum, mean = difference.max().item(), difference.double().mean().item()
    return Row(what, length, maximum, mean, limit if limited else None, by_mean=half is not None)


def _default_reading(
    source: Source, matched: Checkpoint, allow_pickle: bool
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint without match_transformers, and where transformers reads its config in another way.

    Angles in float32 are not listed: they concern every rotary checkpoint. None where the config is refused.
    """
    try:
        default = Checkpoint(source, allow_pickle=allow_pickle)
    except UnsupportedConfig as error:
        return None, [f"refused, {error}"]
    deviations = [
        f"{name} is {here} here, {there} in transformers; for information only"
        for name, here, there in _config_differences(default.config, matched.config)
        if not name.endswith("float32_angles")
    ]
    return default, deviations


def _config_differences(here: Any, there: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two Configs differ: name, value here, value there."""
    for field in dataclasses.fields(here):
        name = field.name
        one, other = getattr(here, name), getattr(there, name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            yield from _config_differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name}", one, other
