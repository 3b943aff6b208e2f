"""Real chat templates, rendered here and by transformers."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from streamllm.chat import ChatTemplateError, render

QUESTIONS = ["Hi!", "  Wie geht's?\n", "日本語 <b>&</b>", "x" * 200]
ANSWERS = ["Fine.", "<think>hm</think>Yes ", "a\nb"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A city."},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["place"],
        },
    },
}
CALL = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Zürich", "unit": "C"}},
}
ANSWER_OF_TOOL = {
    "role": "tool",
    "name": "get_weather",
    "tool_call_id": "abc123def",
    "content": '{"t": 21.5}',
}


def find_templates(folders: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Every template once: its name and text."""
    seen: set[str] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".jinja", ".jinja2"):
                texts = {"": path.read_text(encoding="utf-8", errors="replace")}
            elif path.name == "tokenizer_config.json":
                texts = _in_config(path)
            else:
                continue
            for name, text in texts.items():
                if text not in seen:
                    seen.add(text)
                    yield f"{path.relative_to(folder)} {name}".strip(), text


def _in_config(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError):
        return {}
    if isinstance(value, str):
        return {"": value}
    return {entry["name"]: entry["template"] for entry in value or []}


def chats(count: int) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The same chats for each call, and the options to render them with."""
    rng = random.Random(1)
    made = []
    for index in range(count):
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": "Be brief. " * rng.randrange(1, 4)})
        for turn in range(rng.randrange(1, 6)):
            messages.append(
                {
                    "role": "user",
                    "content": rng.choice(["Hi!", "  Wie geht's?\n", "日本語 <b>&</b>", "x" * 200]),
                }
            )
            if index % 4 == 3 and turn == 0:
                messages.append(
                    {"role": "assistant", "content": rng.choice(["", None]), "tool_calls": [CALL]}
                )
                messages.append(
                    {
                        "role": "tool",
                        "name": "get_weather",
                        "tool_call_id": CALL["id"],
                        "content": '{"t": 21.5}',
                    }
                )
            answer: dict[str, Any] = {
                "role": "assistant",
                "content": rng.choice(ANSWERS),
            }
            if rng.random() < 0.2:
                answer["reasoning_content"] = "let me see"
            messages.append(answer)
        if rng.random() < 0.7:
            messages.append({"role": "user", "content": "and then?"})
        options: dict[str, Any] = {"add_generation_prompt": rng.random() < 0.7}
        if index % 4 >= 2:
            options["tools"] = [TOOL]
        if index % 5 == 0:
            options["enable_thinking"] = rng.random() < 0.5
        made.append((messages, options))
    return made


def compare_template(name: str, source: str, count: int) -> tuple[object, ...]:
    """A row: how many chats both render alike, and how many both refuse."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=source, **SPECIAL)
    rendered = refused = 0
    first = ""
    for messages, options in chats(count):
        expected = got = None
        reason = reference_reason = ""
        try:
            expected = theirs.apply_chat_template(copy.deepcopy(messages), tokenize=False, **options)
        except Exception as error:  # a template can raise anything
            reference_reason = f"{type(error).__name__}: {error}"
        try:
            got = render(source, copy.deepcopy(messages), special_tokens=SPECIAL, **options)
        except ChatTemplateError as error:
            reason = str(error)
        if got != expected:
            first = (
                first
                or f"ours {(got or reason)[:150]!r}, transformers {(expected or reference_reason)[:150]!r}"
            )
        rendered += got is not None and got == expected
        refused += got is None and expected is None
    return name, rendered, refused, first
