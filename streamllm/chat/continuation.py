"""A prompt that ends within its last message, so that the model continues that message."""

from __future__ import annotations

from typing import Any

from streamllm.chat.errors import ChatTemplateError

# Marks the end of the last message. transformers marks it in the same way; the space shows whether the template strips
# the message.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def mark_end(messages: list[dict[str, Any]], field: str) -> str:
    """Marks the end of the text of the last message, in place, and returns the text.

    Args:
        messages: as `render` prepares them.
        field: the key of the text, for example "content" or "reasoning_content".

    Raises:
        ChatTemplateError: the last message has no such text.
    """
    last = messages[-1]
    value = last.get(field)
    if isinstance(value, str):
        # A message's reasoning is there under several names; the template reads one of them.
        for key in [
            key for key, other in last.items() if key == field or (field != "content" and other == value)
        ]:
            last[key] = value + _MARK
        return value
    if isinstance(value, list):
        for block in reversed(value):
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                text: str = block["text"]
                block["text"] = text + _MARK
                return text
    raise ChatTemplateError(
        f"the last message has no text under {field!r} that could be continued; give it one, or leave out "
        f"continue_final_message"
    )


def cut_at_mark(prompt: str, text: str) -> str:
    """The prompt up to the end of its last message, which has this text.

    Raises:
        ChatTemplateError: the template left the last message out.
    """
    index = prompt.rfind(_MARK.strip())
    if index < 0 or text.strip() not in prompt:
        raise ChatTemplateError(
            "the chat template leaves out or changes the last message, so it cannot be continued; leave out "
            "continue_final_message"
        )
    is_stripped = prompt[index : index + len(_MARK)] != _MARK
    return prompt[:index].rstrip() if is_stripped else prompt[:index]
