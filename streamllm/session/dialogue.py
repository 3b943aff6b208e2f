"""Dialogue: the messages of a conversation, and the text that comes next in it.

The text of a turn is what the template adds: the rendering with the new messages, without the rendering so far. So
each turn is fed once. A template that writes earlier turns differently once there are later ones cannot be used
in this way, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamllm.chat import ChatTemplateError

# A longer conversation is rendered without messages in its middle, so that a turn costs the same at any length.
MAX_RENDERED_MESSAGES = 32
REASONING = ("<think>", "</think>")

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # messages, and whether the text begins the model's answer


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, in a stream. Token numbers count from 0, the first token of the stream.

    role: "system", "user", "assistant" or another role of the template. text: the content of the message. start,
    stop: its tokens have the numbers `start` … `stop` - 1, with what the template writes around the message.
    """

    role: str
    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Answer:
    """The model's last answer, which may be incomplete. It becomes a message and a turn when the next one follows."""

    start: int  # the number of its first token; the text that begins an answer belongs to it
    begins: int  # the number of the first token that the model generates
    prefix: str  # text of the answer that the user wrote
    eos: tuple[int, ...]  # the ids that end it


@dataclass(frozen=True)
class Call:
    """What a `chat` or `say` began with, for `undo`."""

    start: int  # the number of its first token
    messages: int
    answer: Answer | None  # the answer that the call completed
    snapshot: Any = None  # the `State` before it, if it is kept
    waiting: tuple[Message, ...] = ()  # messages that it fed with its own


@dataclass(frozen=True)
class Dialogue:
    """The messages of a conversation. It is replaced as a whole."""

    messages: tuple[Message, ...] = ()
    turns: tuple[Turn, ...] = ()
    answer: Answer | None = None
    calls: tuple[Call, ...] = ()
    waiting: tuple[Message, ...] = ()  # messages that are fed with the next one
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template; tools, too
    pushed_to: int = 0  # the number after its last token; for a shorter stream, `before` holds
    before: Dialogue | None = None


@dataclass(frozen=True)
class Part:
    """The text that belongs to one turn."""

    role: str | None  # None: the text that ends the previous answer
    content: str
    text: str


@dataclass(frozen=True)
class Addition:
    """What follows the last token of a conversation."""

    parts: tuple[Part, ...]
    opening: str  # what begins the model's answer
    # The template does not write the token that ended the last answer, or writes a space before it.
    drop_eos: bool
    strips_answer: bool  # the template writes its own space around an answer, so the message has none

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts) + self.opening


def check_messages(given: str | Sequence[Message]) -> list[dict[str, Any]]:
    """The messages of a call. Raises TypeError for anything but a text or a list of messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, Mapping):
        given = [given]
    messages = [dict(message) if isinstance(message, Mapping) else None for message in given]
    if not messages or not all(message and isinstance(message.get("role"), str) for message in messages):
        raise TypeError(
            "chat takes a text or a list of messages, for example [{'role': 'user', 'content': 'Hello'}]"
        )
    return [message for message in messages if message is not None]


def without_known(messages: list[dict[str, Any]], known: Sequence[Message]) -> list[dict[str, Any]]:
    """The new messages of a call, which may repeat all messages of the conversation before them."""
    repeated = len(messages) > len(known) > 0 and all(
        given == dict(message) for given, message in zip(messages, known, strict=False)
    )
    return messages[len(known) :] if repeated else messages


def content_of(message: Message) -> str:
    """The content of a message as text; parts of other kinds are left out."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def rendered_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages to render: all, or the first and the last of a long conversation.

    Messages are left out in pairs, and where a role continues as it was, because templates count them.
    """
    if len(messages) <= MAX_RENDERED_MESSAGES:
        return list(messages)
    head = 0
    while head < len(messages) and messages[head]["role"] in ("system", "developer"):
        head += 1
    first = messages[head]["role"] if head < len(messages) else None
    cut = head + 2 * ((len(messages) - MAX_RENDERED_MESSAGES + head + 1) // 2)
    while cut < len(messages) - 2 and messages[cut]["role"] != first:
        cut += 2
    return [*messages[:head], *messages[cut:]]


def next_text(
    render: Render,
    known: Sequence[Message],
    answer: str | None,
    eos: str | None,
    new: Sequence[Message],
    generate: bool,
    continued: bool = False,
) -> Addition:
    """What the template adds to a conversation.

    Args:
        known: the messages that were fed, without those that `rendered_messages` leaves out.
        answer: the model's answer to them, if there is one.
        eos: the special token that ended it, if one did.
        new: the messages that follow.
        generate: whether the model answers.
        continued: the model continues the last of `new`.

    Raises ChatTemplateError where the template refuses the messages, or rewrites what was fed.
    """
    given, stripped = answer, False
    if answer is not None and answer != answer.strip():
        # The template may write the space before an answer itself.
        trimmed = answer.strip()
        every = [*known, {"role": "assistant", "content": trimmed}, *new]
        stripped = render(every, generate and not continued).startswith(render(known, True) + answer)
        given = trimmed if stripped else answer
    answered = [] if given is None else [{"role": "assistant", "content": given}]
    every = [*known, *answered, *new]
    whole = render(every, generate and not continued)
    before = render(known, answer is not None) if known else ""
    at, drop_eos = len(before), False
    if answer is not None:
        at, drop_eos = _behind_answer(whole, before, answer, eos)
    elif not whole.startswith(before):
        raise _rewrites()
    stop = len(whole)
    if continued:
        content = content_of(new[-1]).strip()
        found = whole.rfind(content)
        if found < at:
            raise ChatTemplateError("the chat template does not write the message that is to be continued")
        stop = found + len(content)
    parts = list[Part]()
    ends = _ends(render, every, len(new), whole, at, stop, generate, continued)
    roles = [(None, ""), *((message["role"], content_of(message)) for message in new)]
    if continued:
        roles.pop()
    start = at
    for (role, content), end in zip(roles, ends, strict=True):
        if role is not None or end > start:
            parts.append(Part(role, content, whole[start:end]))
        start = end
    return Addition(tuple(parts), whole[start:stop], drop_eos, stripped)


def _behind_answer(whole: str, before: str, answer: str, eos: str | None) -> tuple[int, bool]:
    """Where the text after an answer begins, and whether something else than its end token follows.

    Templates strip an answer, put a space around it, or leave its reasoning out. What the model generated stays as
    it was.
    """
    for begin, text in _as_written(before, answer):
        at, stripped = len(begin), text.strip()
        lead = len(whole[at:]) - len(whole[at:].lstrip())
        if whole.startswith(begin) and whole.startswith(text, at):
            at += len(text)
            break
        if whole.startswith(begin) and whole.startswith(stripped, at + lead):
            at += lead + len(stripped)
            break
    else:
        raise _rewrites()
    if eos is None:
        return at, False
    return (at + len(eos), False) if whole.startswith(eos, at) else (at, True)


def _as_written(before: str, answer: str) -> Iterator[tuple[str, str]]:
    """The text before an answer, and the answer, as templates write them once there are later messages."""
    yield before, answer
    opening, begun, _ = before.rstrip().rpartition(REASONING[0])
    _, ended, text = answer.rpartition(REASONING[1])
    if ended:
        yield before, text
    if begun and before.rstrip().endswith(begun):  # the template begins the reasoning for the model
        yield opening, text if ended else answer


def _ends(
    render: Render,
    kept: Sequence[Message],
    new: int,
    whole: str,
    at: int,
    stop: int,
    generate: bool,
    continued: bool,
) -> list[int]:
    """Where the text of the last answer ends, and that of each new message that is not continued."""
    ends: list[int] = []
    old = len(kept) - new
    for count in range(old, len(kept) + (not continued)):
        if count == len(kept) and not generate:
            end: int | None = stop
        elif not count:
            end = at
        else:
            end = _end_of_prefix(render, kept, count, whole)
        low = ends[-1] if ends else at
        ends.append(low if end is None else min(max(end, low), stop))
    return ends


def _end_of_prefix(render: Render, kept: Sequence[Message], count: int, whole: str) -> int | None:
    """Where the first `count` messages end in the rendering of all of them."""
    try:
        text = render(kept[:count], False)
    except ChatTemplateError:
        text = None
    if text is not None and whole.startswith(text) and content_of(kept[count - 1]).strip() in text:
        return len(text)
    if count == len(kept):
        return len(whole)
    # The template writes a system prompt into the first user message. The prompt ends where the content begins.
    message = kept[count]
    if not isinstance(message.get("content"), str):
        return None
    try:
        other = render([*kept[:count], {**message, "content": "\ue0ff"}, *kept[count + 1 :]], True)
    except ChatTemplateError:
        return None
    end = 0
    while end < min(len(other), len(whole)) and other[end] == whole[end]:
        end += 1
    return end


def _rewrites() -> ChatTemplateError:
    return ChatTemplateError(
        "the chat template rewrites earlier turns, so they would have to be read again: start a new stream with all "
        "messages, or give another chat_template"
    )
