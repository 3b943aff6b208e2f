"""What a tokenizer.json may ask for. The tokenizers library sets no limits and ends the process if memory runs out.

A short text must not become a long one: each `Replace` multiplies its length, and so does each `$A` of a
post-processor. Files of real tokenizers stay far below these limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamllm.tokenizer.errors import TokenizerError

MAX_STAGES = 100  # of a normaliser, a pre-tokeniser, a post-processor or a decoder
MAX_GROWTH = 10_000  # by which all stages together may multiply the length of a text
MAX_TEMPLATE_PIECES = 100  # of a post-processor
MAX_TEMPLATE_IDS = 100


def check_limits(path: Path, values: dict[str, Any]) -> None:
    """Raises TokenizerError for a tokenizer.json whose rules could make a text much longer."""
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1
        for count, stage in enumerate(_stages(values.get(part)), 1):
            growth *= _growth(stage)
            if count > MAX_STAGES:
                raise TokenizerError(f"{path}: its {part} has more than {MAX_STAGES} stages")
            if growth > MAX_GROWTH:
                raise TokenizerError(
                    f"{path}: its {part} could make a text more than {MAX_GROWTH:,} times as long"
                )
            _check_template(path, stage)


def _stages(value: Any) -> Iterator[dict[str, Any]]:
    """All objects with a type in a value, those inside others too."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if isinstance(each.get("type"), str):
                yield each
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)


def _growth(stage: dict[str, Any]) -> int:
    """How many characters one character can become."""
    if stage["type"] == "Replace" and isinstance(stage.get("content"), str):
        pattern = stage.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        length = (
            len(text) if isinstance(text, str) else 0
        )  # a regular expression may match nothing, everywhere
        return max(1, -(-len(stage["content"]) // length) if length else 1 + len(stage["content"]))
    if stage["type"] == "Prepend" and isinstance(stage.get("prepend"), str):
        return 1 + len(stage["prepend"]) // 10
    return 1


def _check_template(path: Path, stage: dict[str, Any]) -> None:
    if stage["type"] != "TemplateProcessing":
        return
    for name in ("single", "pair"):
        pieces = stage.get(name)
        if isinstance(pieces, (list, str)) and len(pieces) > MAX_TEMPLATE_PIECES:
            raise TokenizerError(
                f"{path}: its post_processor adds more than {MAX_TEMPLATE_PIECES} pieces to a text"
            )
    tokens = stage.get("special_tokens")
    for token in tokens.values() if isinstance(tokens, dict) else []:
        ids = token.get("ids") if isinstance(token, dict) else None
        if isinstance(ids, list) and len(ids) > MAX_TEMPLATE_IDS:
            raise TokenizerError(
                f"{path}: its post_processor adds more than {MAX_TEMPLATE_IDS} ids to a text"
            )
