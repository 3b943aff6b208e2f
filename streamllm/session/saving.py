"""Saving: the state of a stream as JSON and tensors, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from streamllm.loop import LoopState
from streamllm.session.dialogue import Answer, Call, Dialogue, Turn
from streamllm.session.files import (
    SessionError,
    check_fingerprint,
    fingerprint,
    read,
    remove_leftovers,
    write,
)
from streamllm.session.state import State, capture
from streamllm.session.view import AnswerText, Cut, Removed, View
from streamllm.stop_strings import Held, Segment
from streamllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from streamllm.stream import Stream

CACHE = "cache."  # the prefix of the names of the cache's tensors
LOGITS = "logits"


@dataclass(frozen=True)
class Autosave:
    """Where and when a stream saves itself."""

    path: Path
    tokens: int | None  # after this many tokens; None: after each turn


def autosave(path: str | os.PathLike[str] | None, every: int | str) -> Autosave | None:
    """The settings of `Stream.autosave`. Raises ValueError."""
    if path is None:
        return None
    remove_leftovers(Path(path))
    if every == "turn":
        return Autosave(Path(path), None)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f'every must be "turn" or a number of tokens of at least 1, not {every!r}')
    return Autosave(Path(path), every)


def save(stream: Stream, path: str | os.PathLike[str]) -> None:
    """See `Stream.save`."""
    state = capture(stream, share_cache=True)
    tensors = {CACHE + name: tensor for name, tensor in state.cache.items()}
    if state.loop.logits is not None:
        tensors[LOGITS] = state.loop.logits
    if stream._fingerprint is None:
        stream._fingerprint = fingerprint(stream.model, stream.tokenizer)
    saved = {
        "settings": stream._settings(),
        "belongs to": stream._fingerprint,
        "stream": _state_to_json(state),
    }
    write(Path(path), saved, tensors)


def open_file(
    path: str | os.PathLike[str], model: nn.Module, tokenizer: Tokenizer
) -> tuple[dict[str, Any], State, dict[str, Any]]:
    """The settings, the state and the model's fingerprint. Raises SessionError and OSError."""
    path = Path(path)
    saved, tensors = read(path)
    own = fingerprint(model, tokenizer)
    check_fingerprint(path, saved.get("belongs to", {}), own)
    try:
        return dict(saved["settings"]), _state_from_json(saved["stream"], tensors), own
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path} does not hold a whole session: {error}") from None


def _state_to_json(state: State) -> dict[str, Any]:
    dialogue = replace(state.dialogue, calls=tuple(replace(c, snapshot=None) for c in state.dialogue.calls))
    view, loop = state.view, state.loop
    return {
        "first": loop.first,
        "tokens": loop.tokens,
        "history": loop.history,
        "history size": loop.history_size,
        "cuts": loop.cuts,
        "drawn": loop.drawn,
        "finish reason": state.finish_reason,
        "view": {
            **asdict(replace(view, answer=None)),
            "answer": None if view.answer is None else [view.answer.begins, view.answer.text],
        },
        "dialogue": asdict(dialogue),
    }


def _state_from_json(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    cache = {name[len(CACHE) :]: tensor for name, tensor in tensors.items() if name.startswith(CACHE)}
    logits = tensors.get(LOGITS)
    loop = LoopState(
        None if logits is None else logits.clone(),  # a part of the file's memory would keep all of it
        saved["first"],
        tuple(saved["tokens"]),
        tuple(saved["history"]),
        saved["history size"],
        saved["cuts"],
        saved["drawn"],
    )
    return State(
        cache,
        loop,
        _view(saved["view"]),
        _dialogue(saved["dialogue"]),
        saved["finish reason"],
    )


def _view(saved: Mapping[str, Any]) -> View:
    held, cut, answer = saved["held"], saved["cut"], saved["answer"]
    return View(
        **{
            **saved,
            "held": Held(tuple(Segment(**segment) for segment in held["segments"]), held["told"]),
            "cut": None if cut is None else Cut(**{**cut, "then": tuple(cut["then"])}),
            "answer": None if answer is None else AnswerText(answer[0], [answer[1]], 1),
            "first": tuple(saved["first"]),
            "removed": tuple(Removed(**part) for part in saved["removed"]),
        }
    )


def _dialogue(saved: Mapping[str, Any]) -> Dialogue:
    return Dialogue(
        **{
            **saved,
            "messages": tuple(saved["messages"]),
            "turns": tuple(Turn(**turn) for turn in saved["turns"]),
            "answer": _answer(saved["answer"]),
            "calls": tuple(map(_call, saved["calls"])),
            "waiting": tuple(saved["waiting"]),
            "before": None,
        }
    )


def _call(saved: Mapping[str, Any]) -> Call:
    waiting = tuple(saved.get("waiting", ()))
    return Call(**{**saved, "answer": _answer(saved["answer"]), "waiting": waiting})


def _answer(saved: Mapping[str, Any] | None) -> Answer | None:
    return None if saved is None else Answer(**{**saved, "eos": tuple(saved["eos"])})
