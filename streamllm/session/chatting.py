"""Chatting: the next messages of a conversation become tokens of its stream, each fed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamllm.chat import ChatTemplateError
from streamllm.session.dialogue import (
    Addition,
    Answer,
    Call,
    Dialogue,
    Message,
    Render,
    Turn,
    content_of,
    next_text,
    rendered_messages,
)
from streamllm.session.prompt import Spelled
from streamllm.session.state import State, capture
from streamllm.session.view import AnswerText

if TYPE_CHECKING:
    from streamllm.stream import Stream

DEFAULT_SINKS = 4  # the paper's; a system prompt may be shorter
PROBE = {"role": "user", "content": "Hello"}  # a message that could follow a system prompt


def closed(stream: Stream, dialogue: Dialogue, strip: bool = False) -> Dialogue:
    """The conversation, in which the last answer is a message and a turn like the others.

    strip: the message has no space around it. The turn has the text that was shown.
    """
    answer = dialogue.answer
    if answer is None:
        return dialogue
    text = answer_text(stream, answer)
    message = {"role": "assistant", "content": text.strip() if strip else text}
    return replace(
        dialogue,
        messages=(*dialogue.messages, message),
        turns=(*dialogue.turns, answer_turn(stream, answer)),
        answer=None,
    )


def answer_turn(stream: Stream, answer: Answer) -> Turn:
    """The turn of the last answer, as far as it was generated."""
    return Turn("assistant", answer_text(stream, answer), answer.start, stream._end)


def answer_text(stream: Stream, answer: Answer) -> str:
    """The text of the last answer, as far as it was generated."""
    view = stream._view
    shown = view.answer.text if view.answer is not None and view.answer.begins == answer.begins else ""
    return answer.prefix + shown + view.owed + view.held.shown(len(view.held.text))


def begin(
    stream: Stream,
    new: Sequence[Message],
    variables: Mapping[str, Any] | None,
    *,
    eos: Sequence[int],
    generate: bool,
    continued: bool = False,
) -> tuple[list[int], Dialogue]:
    """The tokens of the next messages, and the conversation after they were pushed.

    Raises ChatTemplateError where the tokenizer has no template, or its template refuses the messages.
    """
    stream._settle()
    dialogue = stream._now
    variables = dict(dialogue.variables if variables is None else variables)
    new = [*dialogue.waiting, *new]
    answer, loop, tokenizer = dialogue.answer, stream._loop, stream.tokenizer
    text = None if answer is None else answer_text(stream, answer)
    last = loop.drawn if loop.drawn is not None else loop.log.tokens[-1] if loop.log.tokens else None
    ended = answer is not None and last is not None and stream._end > answer.begins and last in answer.eos
    eos_text = tokenizer.special_text(last) if ended and last is not None else None
    answered = [] if text is None else [{"role": "assistant", "content": text}]
    rendered = rendered_messages([*dialogue.messages, *answered, *new])
    spelled = Spelled(tokenizer, rendered)
    addition = next_text(
        _renderer(stream, variables),
        spelled.hide(rendered[: len(rendered) - len(answered) - len(new)]),
        None if text is None else spelled.hide(text),
        eos_text,
        spelled.hide(new),
        generate,
        continued,
    )
    if addition.drop_eos:
        stream._take_back(stream._end - 1)
        last = None
    is_first = not dialogue.turns
    ids, ends = _encode(stream, addition, spelled, last, is_first)
    if (
        is_first
        and stream.pins_system
        and not stream._end
        and addition.parts[0].role in ("system", "developer")
    ):
        stream._make_cache(max(ends[0], DEFAULT_SINKS), dialogue)
    number = stream._end
    call = Call(number, len(dialogue.messages), answer, _snapshot(stream), dialogue.waiting)
    before, dialogue = dialogue, closed(stream, dialogue, addition.strips_answer)
    turns = list(dialogue.turns)
    start = number
    for part, end in zip(addition.parts, ends, strict=True):
        if part.role is not None:
            turns.append(Turn(part.role, spelled.reveal(part.content), start, number + end))
        elif turns:
            turns[-1] = replace(turns[-1], stop=number + end)
        start = number + end
    pushed_to = number + len(ids)
    messages = [*dialogue.messages, *(new[:-1] if continued else new)]
    prefix = str(new[-1].get("content", "")) if continued else ""
    calls = list(dialogue.calls)
    for index in reversed(range(len(calls) - max(0, stream.snapshots - 1))):
        if calls[index].snapshot is None:
            break
        calls[index] = replace(calls[index], snapshot=None)
    return ids, Dialogue(
        tuple(messages),
        tuple(turns),
        Answer(start, pushed_to, prefix, tuple(eos)) if generate else None,
        (*calls, call),
        variables=variables,
        pushed_to=pushed_to,
        before=replace(before, before=None),
    )


def waits(stream: Stream, role: str, variables: Mapping[str, Any] | None, message: Message) -> bool:
    """Whether a message cannot be fed before the next one: a template may write it into the first user message."""
    dialogue = stream._now
    if dialogue.turns or role not in ("system", "developer"):
        return False
    if stream.tokenizer.chat_template is None:
        return False  # `begin` raises the error now
    messages = [*dialogue.waiting, message]
    render = _renderer(stream, dict(dialogue.variables if variables is None else variables))
    try:
        alone = render(messages, False)
        is_written = content_of(message).strip() in alone
        return not (is_written and render([*messages, PROBE], True).startswith(alone))
    except ChatTemplateError:
        return True


def _renderer(stream: Stream, variables: Mapping[str, Any]) -> Render:
    def render(messages: Sequence[Message], opens_answer: bool) -> str:
        return stream.tokenizer.render_chat_template(
            messages, add_generation_prompt=opens_answer, **variables
        )

    return render


def _encode(
    stream: Stream, addition: Addition, spelled: Spelled, last: int | None, is_first: bool
) -> tuple[list[int], list[int]]:
    """The ids of what is added, and after how many of them each part ends."""
    goes_on = stream._end > 0

    def encode(text: str) -> list[int]:
        ids = spelled.encode(text, bos=None, continuation=goes_on, after=last)
        if is_first and goes_on and ids[:1] == [stream.tokenizer.bos_token_id]:
            ids = ids[1:]  # the stream has its BOS, or was begun without one
        return ids

    ids, ends, text = encode(addition.text), list[int](), ""
    for part in addition.parts:
        text += part.text
        count = len(ids) if len(text) == len(addition.text) else len(encode(text)) if text else 0
        ends.append(min(count, len(ids)))
    return ids, ends


def _snapshot(stream: Stream) -> State | None:
    """The state before a call. The calls in it have no snapshots, or each snapshot would keep the one before it."""
    if not stream.snapshots:
        return None
    state = capture(stream)
    return replace(state, dialogue=replace(state.dialogue, calls=()))


def undo_without_snapshot(stream: Stream, dialogue: Dialogue, call: Call) -> None:
    """Take back what a call pushed, and what was generated after it."""
    messages, text = dialogue.messages, ""
    if call.answer is not None:  # it is the last answer again
        text = next((turn.text for turn in dialogue.turns if turn.start == call.answer.start), "")
    shown = None
    if call.answer is not None:
        shown = AnswerText(call.answer.begins, [text[len(call.answer.prefix) :]], 1)
    before = replace(
        dialogue,
        messages=messages[: call.messages],
        turns=tuple(
            turn
            for turn in dialogue.turns
            if turn.start < (call.start if call.answer is None else call.answer.start)
        ),
        answer=call.answer,
        calls=dialogue.calls[:-1],
        waiting=call.waiting,
        pushed_to=0,
        before=None,
    )
    stream._take_back(call.start, before, shown)
