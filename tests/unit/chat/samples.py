"""Chats, options and templates: prompts in the styles of well-known families, written for these tests."""

from pathlib import Path

STYLES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'What it is like <outside> & "inside"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": ["integer", "null"], "enum": [1, 2.5, None, True]},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
CALL = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich"}},
}

CHATS = {
    "one": [{"role": "user", "content": " Hello! "}],
    "system": [
        {"role": "system", "content": "Be <brief>.\n"},
        {"role": "user", "content": "Wer bist du?\r\n\r\n\n\n日本語 👩‍👧 é"},
        {"role": "assistant", "content": "  I am …  "},
        {"role": "user", "content": "</s><|im_end|> {{ bos_token }} {% raw %}"},
    ],
    "long": [
        {"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}\n" * (turn + 1)}
        for turn in range(9)
    ],
    "tools": [
        {"role": "user", "content": "What is it like in Zürich?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "abc123def"},
        {"role": "assistant", "content": "<think>\nclear\n</think>\n\nClear.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ],
    "thinking": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "thinking": "two and two"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "6", "reasoning": "\nthree and three\n"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "See."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]},
    ],
    "two calls": [
        {"role": "user", "content": "And in Bern?"},
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": {"sky": ["grey", 3.5, None]}},
        {"role": "tool", "content": "rain", "tool_call_id": "x"},
    ],
    "unknown role": [{"role": "narrator", "content": "Once upon a time"}],
    "wrong turns": [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi again"}],
}
OPTIONS = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": [WEATHER], "enable_thinking": False, "date_string": "1 May"},
    {
        "tools": [WEATHER, WEATHER],
        "documents": [{"title": "on time", "text": "Time flies like an arrow, so they say."}],
    },
    {"tools": [], "bos_token": "<other>"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
