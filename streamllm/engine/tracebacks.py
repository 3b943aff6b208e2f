"""drop_frames(): an error that is kept for long does not keep the streams and tensors of the step that raised it."""

from __future__ import annotations

import contextlib
import traceback

HEADING = "It was raised here:\n"


def drop_frames(error: BaseException) -> None:
    """Replace the traceback of an error, and of those that caused it, by its text, as a note.

    The frames of a traceback keep their local variables: all streams of a step, the slots, the tensors of a forward.
    Python 3.10 has no notes, so there the text is lost.
    """
    note = HEADING + "".join(traceback.format_exception(type(error), error, error.__traceback__))
    with contextlib.suppress(AttributeError):
        if not any(known.startswith(HEADING) for known in getattr(error, "__notes__", ())):
            error.add_note(note)  # type: ignore[attr-defined, unused-ignore]
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            found.__traceback__ = None
            left += [found.__cause__, found.__context__]
