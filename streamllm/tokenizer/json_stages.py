"""How the stages of a tokenizer.json change for a part of a text: no prefix, and no stripped spaces.

A stage is the JSON object that the tokenizers library writes for a normaliser or a pre-tokeniser.
"""

from __future__ import annotations

from typing import Any

Stage = dict[str, Any]

# Pre-tokenisers that drop the spaces between words. A Metaspace behind one of them marks every word.
_DROP_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")


def normalizer_of_piece(stage: Stage | None, prefix: bool) -> Stage | None:
    """A normaliser for a part of a text; `prefix`: the part is the text's start.

    Llama's `Prepend "▁"` acts at the start only. `Strip` would drop spaces between two parts.
    """
    if stage is None:
        return None
    kind = stage["type"]
    if kind == "Sequence":
        inner = [normalizer_of_piece(each, prefix) for each in stage["normalizers"]]
        return {**stage, "normalizers": [each for each in inner if each is not None]}
    if kind == "Prepend" and not prefix:
        return None
    if kind == "Strip":
        return {**stage, "strip_left": stage["strip_left"] and prefix, "strip_right": False}
    return stage


def pre_tokenizer_of_piece(stage: Stage | None, prefix: bool) -> Stage | None:
    """A pre-tokeniser for a part of a text, with the prefix space of Metaspace and ByteLevel only at the start."""
    if stage is None or prefix:
        return stage
    kind = stage["type"]
    if kind == "Sequence":
        inner = stage["pretokenizers"]
        if any(each["type"] in _DROP_SPACES for each in inner):
            return stage
        return {**stage, "pretokenizers": [pre_tokenizer_of_piece(each, prefix) for each in inner]}
    if kind == "Metaspace":
        return {**stage, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**stage, "add_prefix_space": False}
    return stage


def prefix_behind_added(normalizer: Stage | None, pre_tokenizer: Stage | None) -> bool:
    """Whether the text behind an added token gets the prefix, too. Metaspace "first" acts at the start only."""
    stages = [*_flatten(normalizer, "normalizers"), *_flatten(pre_tokenizer, "pretokenizers")]
    return any(
        stage["type"] == "Prepend"
        or (stage["type"] == "Metaspace" and stage["prepend_scheme"] == "always")
        or (stage["type"] == "ByteLevel" and stage["add_prefix_space"])
        for stage in stages
    )


def _flatten(stage: Stage | None, key: str) -> list[Stage]:
    if stage is None:
        return []
    if stage["type"] == "Sequence":
        return [inner for each in stage[key] for inner in _flatten(each, key)]
    return [stage]
