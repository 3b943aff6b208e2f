"""State: everything that the continuation of a stream depends on, besides its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from streamllm.loop import Loop, LoopState
from streamllm.session.dialogue import Dialogue
from streamllm.session.view import View

if TYPE_CHECKING:
    from streamllm.stream import Stream


@dataclass(frozen=True, eq=False)
class State:
    """A copy of the state of a stream."""

    cache: Mapping[str, Tensor]  # of `SinkCache.state_dict`
    loop: LoopState
    view: View
    dialogue: Dialogue
    finish_reason: str | None


def capture(stream: Stream, share_cache: bool = False) -> State:
    """A copy of the state. share_cache: its tensors are the cache's own, to be written to a file at once."""
    stream._settle()
    loop_state = stream._loop.state()
    view = stream._view
    if view.answer is not None:  # its list of pieces still grows
        answer = replace(view.answer, pieces=view.answer.pieces[: view.answer.count])
        view = replace(view, answer=answer)
    cache = stream.cache.state_dict() if share_cache else stream.cache.snapshot()
    return State(cache, loop_state, view, replace(stream._now, before=None), stream.finish_reason)


def restore(stream: Stream, state: State) -> None:
    """Return the stream to a state, which can be restored again. Raises ValueError where it does not fit the cache.

    After an interrupt, the next use of the stream restores the state again.
    """
    cache = stream.cache
    own = cache.state_dict()
    stream._restoring = state
    try:
        cache.load_state_dict(
            {
                name: tensor.to(own[name].dtype) if name in own else tensor
                for name, tensor in state.cache.items()
            }
        )
    except ValueError:
        stream._restoring = None  # nothing was changed
        raise
    loop = Loop(stream.model, cache)
    loop.restore(state.loop)
    view = state.view
    if view.answer is not None:
        view = replace(view, answer=replace(view.answer, pieces=list(view.answer.pieces)))
    stream._loop, stream._view, stream._dialogue = loop, view, state.dialogue
    stream._decoder_at = stream._dropping = None
    stream.finish_reason, stream.logprobs = state.finish_reason, []
    stream._restoring = None
