"""render(): a chat template and messages -> the text of a prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError

from streamllm.chat.budget import Budget, Limits
from streamllm.chat.continuation import cut_at_mark, mark_end
from streamllm.chat.errors import ChatTemplateError, RefusedByTemplate
from streamllm.chat.sandbox import Sandbox
from streamllm.weights.errors import shorten

Message = Mapping[str, Any]

# While it compiles, jinja2 computes constant expressions. What exceeds this budget is left to the run.
COMPILE_LIMITS = Limits(steps=10_000, seconds=0.5, size=100_000)
MAX_CACHED_TEMPLATES = 16
MAX_REASON_CHARACTERS = 300

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str | Mapping[str, str] | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    special_tokens: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    **variables: Any,
) -> str:
    """The text of a prompt. Encode it with `add_special_tokens=False`, because templates write BOS.

    The result is that of transformers 5: keys of a message that are None are left out, and a message's
    `reasoning` or `thinking` is available as `reasoning_content`, too.

    Args:
        template: the template, or several by name: "tool_use" is taken if there are tools, else "default".
        messages: at least one, for example `[{"role": "user", "content": "Hello"}]`.
        tools: JSON schemas of functions that the model may call.
        documents: texts that the model may cite.
        add_generation_prompt: end the prompt with the text that begins the model's answer.
        continue_final_message: end the prompt with the last message's text, without the tokens that end it, so
            that the model continues it; or with the text under this key of the message.
        special_tokens: by name; the template has `bos_token` and so on as variables.
        limits: what the template may use; None is `Limits()`.
        variables: other variables of the template, for example `enable_thinking=False`.

    Raises:
        ChatTemplateError: there is no such template; it is broken, refuses the messages, does something
            forbidden or exceeds the limits; or the messages hold a value that is not JSON.
        ValueError: both `add_generation_prompt` and `continue_final_message` are given.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "give add_generation_prompt, which begins a new message, or continue_final_message, which "
            "continues the last one, not both"
        )
    limits = limits or Limits()
    source = _choose(template, has_tools=tools is not None)
    if len(source) > limits.template:
        raise ChatTemplateError(
            f"the chat template has {len(source):,} characters; at most {limits.template:,} are allowed"
        )
    try:
        prepared = _prepare(messages)
        continued = ""
        if continue_final_message:
            continued = mark_end(
                prepared, "content" if continue_final_message is True else continue_final_message
            )
        given = {
            **(special_tokens or {}),
            **_as_json(variables, "a template variable"),
            "messages": prepared,
            "tools": _as_json(tools, "tools"),
            "documents": _as_json(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        code = _compile(source)
        sandbox = Sandbox(Budget(limits, given))
        prompt = Template.from_code(sandbox, code, sandbox.make_globals(None)).render(given)
        return cut_at_mark(prompt, continued) if continue_final_message else prompt
    except RefusedByTemplate as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None
    except RecursionError:
        raise ChatTemplateError("the chat template, or the chat, is nested too deeply") from None
    except SecurityError as error:
        raise ChatTemplateError(f"the chat template did something that no template may do: {error}") from None
    except ChatTemplateError:
        raise
    except Exception as error:  # a template can raise anything
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if isinstance(line, int) else ""
        reason = shorten(str(error), MAX_REASON_CHARACTERS) or type(error).__name__
        raise ChatTemplateError(f"the chat template does not work{where}: {reason}") from error


@functools.lru_cache(maxsize=MAX_CACHED_TEMPLATES)
def _compile(source: str) -> CodeType:
    """The code of a template. It is compiled once; each run gives it a sandbox and thereby a budget."""
    return Sandbox(Budget(COMPILE_LIMITS, {})).compile(source)


def _choose(template: str | Mapping[str, str] | None, has_tools: bool) -> str:
    if template is None:
        raise ChatTemplateError(
            "this tokenizer has no chat template, so its model was probably not trained on chats; pass "
            "chat_template=…, or give the model plain text"
        )
    if isinstance(template, str):
        return template
    for name in ("tool_use", "default") if has_tools else ("default",):
        if name in template:
            return template[name]
    raise ChatTemplateError(
        f"none of the chat templates {', '.join(sorted(template))} is called default; pass one of them as "
        f"chat_template=tokenizer.chat_template[name]"
    )


def _prepare(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates expect them: in JSON's types, without keys that are None."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ChatTemplateError(
            "messages must be a list of at least one message, for example "
            "[{'role': 'user', 'content': 'Hello'}]"
        )
    prepared: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(
                f"message {index} is a {type(message).__name__}; a message must be a dict, for example "
                "{'role': 'user', 'content': 'Hello'}"
            )
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in _REASONING_KEYS if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        prepared.append(_as_json(kept, f"message {index}"))
    return prepared


def _as_json(value: Any, where: str) -> Any:
    """A copy in exactly JSON's types. Other objects have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_as_json(key, where): _as_json(inner, where) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner, where) for inner in value]
    raise ChatTemplateError(
        f"{where} holds a {type(value).__name__}; allowed are text, numbers, booleans, None, and lists and "
        f"dicts of them"
    )
