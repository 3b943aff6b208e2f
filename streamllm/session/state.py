"""State: everything that the continuation of a stream depends on, besides its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from streamllm.loop import Log, Loop
from streamllm.sampling import History
from streamllm.session.dialogue import Dialogue
from streamllm.session.view import View

if TYPE_CHECKING:
    from streamllm.stream import Stream


@dataclass(frozen=True, eq=False)
class State:
    """A copy of the state of a stream."""

    cache: Mapping[str, Tensor]  # of `SinkCache.state_dict`
    logits: Tensor | None  # [V], for the next token, if they are known
    first: int  # the number of the first of `tokens`
    tokens: tuple[int, ...]  # the last token that the cache took in, and those that wait
    history: tuple[int, ...]  # the last tokens, for the penalties
    history_size: int
    cuts: int
    drawn: int | None
    view: View
    dialogue: Dialogue
    finish_reason: str | None


def capture(stream: Stream, share_cache: bool = False) -> State:
    """A copy of the state. share_cache: its tensors are the cache's own, to be written to a file at once."""
    stream._settle()
    loop = stream._loop
    history = loop.last_tokens(loop.end)
    log = loop.log
    # Interrupted while a forward ran ahead: the token is not in the stream yet.
    if loop.seen > log.end:
        loop.cache.step_back()
    state = loop.cache.state_dict() if share_cache else loop.cache.snapshot()
    logits = loop.logits
    view = stream._view
    if view.answer is not None:  # its list goes on
        answer = replace(view.answer, pieces=view.answer.pieces[: view.answer.count])
        view = replace(view, answer=answer)
    return State(
        state,
        None if logits is None else logits.clone(),
        log.first,
        tuple(log.tokens),
        tuple(history),
        log.history.size,
        log.cuts,
        loop.drawn,
        view,
        replace(stream._now, before=None),
        stream.finish_reason,
    )


def restore(stream: Stream, state: State) -> None:
    """Return to a state, which can be used again. Raises ValueError where it does not fit the cache."""
    cache = stream.cache
    own = cache.state_dict()
    cache.load_state_dict(
        {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in state.cache.items()}
    )
    loop = Loop(stream.model, cache)
    history = History(state.history_size, state.history)
    end = state.first + len(state.tokens)
    loop.log = Log(state.first, list(state.tokens), history, end - history.total, state.cuts)
    if state.logits is not None:
        weight = next(stream.model.parameters())
        loop._logits = end, state.logits.to(weight.device, cache.dtype)
    if state.drawn is not None:
        loop._drawn = end, state.drawn
    view = state.view
    if view.answer is not None:
        view = replace(view, answer=replace(view.answer, pieces=list(view.answer.pieces)))
    stream._loop, stream._view, stream._dialogue = loop, view, state.dialogue
    stream._decoder_at = None
    stream.finish_reason, stream.logprobs = state.finish_reason, []
