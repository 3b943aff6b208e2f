"""Real chat templates turn by turn: what each turn adds, put together, is the rendering of the whole conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from real_templates import SPECIAL

from streamllm.chat import ChatTemplateError, render
from streamllm.session.dialogue import next_text, rendered_messages

# Short, and longer than the conversations that are rendered whole (`MAX_RENDERED_MESSAGES`).
LENGTHS = (4, 24)
USERS = ("Hello there", "  Wie geht's?\n", "日本語 <b>&</b>", "and {more}?")
ANSWERS = ("Fine.", "a\nb", "So {it} goes: 1, 2")
END = re.compile(r"\s*(<[^<>\s]{1,40}>|\[/?[A-Z_]{1,20}\])")  # a token as templates spell it


def compare_turns(name: str, source: str) -> tuple[object, ...]:
    """A row of the table: how many conversations are equal; how many differ only by spaces around an answer, which stay
    as the model generated them; how many are refused because the template rewrites earlier turns; how many the template
    itself refuses; and the first conversation that differs."""
    counts = {"equal": 0, "spaces": 0, "rewrites": 0, "refused": 0}
    first = ""
    for system in (None, "Be brief."):
        for spaced in (False, True):
            for length in LENGTHS:
                found = _talk(source, system, " " if spaced else "", length)
                if found in counts:
                    counts[found] += 1
                else:
                    first = first or f"{'with' if system else 'no'} system, {length} turns: {found}"
    return name, *counts.values(), first


def _talk(source: str, system: str | None, space: str, length: int) -> str:
    """ "equal", or why not."""

    def rendered(messages: Sequence[Mapping[str, Any]], opens_answer: bool) -> str:
        return render(source, messages, special_tokens=SPECIAL, add_generation_prompt=opens_answer)

    messages: list[dict[str, str]] = []
    answer: str | None = None
    eos: str | None = None
    text, exact = "", True
    try:
        end = _end_token(source)
        for turn in range(length):
            new = [{"role": "user", "content": USERS[turn % len(USERS)]}]
            if system and not turn:
                new.insert(0, {"role": "system", "content": system})
            answered = [] if answer is None else [{"role": "assistant", "content": answer}]
            kept = rendered_messages([*messages, *answered, *new])
            known = kept[: len(kept) - len(answered) - len(new)]
            added = next_text(rendered, known, answer, eos, new, True)
            if added.drop_eos and eos is not None:
                text = text[: -len(eos)]
            text += added.text
            messages += [*({**old, "content": old["content"].strip()} for old in answered), *new]
            whole = rendered(messages, True)
            if _without_spaces(text) != _without_spaces(whole):
                pairs = enumerate(zip(text + "\0", whole + "\1", strict=False))
                at = next(index for index, (ours, theirs) in pairs if ours != theirs)
                return f"turn {turn}: fed {text[at - 20 : at + 40]!r}, whole {whole[at - 20 : at + 40]!r}"
            exact = exact and text == whole
            answer, eos = space + ANSWERS[turn % len(ANSWERS)], end
            text += answer + (eos or "")
    except ChatTemplateError as error:
        return "rewrites" if "rewrites earlier turns" in str(error) else "refused"
    return "equal" if exact else "spaces"


def _without_spaces(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _end_token(source: str) -> str | None:
    """The token that ends an answer: the first token after it."""
    question = [{"role": "user", "content": "Hi"}]
    whole = render(
        source, [*question, {"role": "assistant", "content": "ANSWER"}, *question], special_tokens=SPECIAL
    )
    _, _, rest = whole.partition("ANSWER")
    found = END.match(rest)
    return found.group(1) if found else None
