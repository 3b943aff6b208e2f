"""TokenKind: what the kernels of a one-token forward depend on besides numbers, so that few recordings serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamllm.cache.ring import Layout

# A ring that fills is read in steps of so many slots, because CPU kernels are prepared anew for each size.
READ_STEP_SLOTS = 256
# The steps of what is recorded or compiled are wider, so that few recordings serve a window that fills.
RECORDED_STEP_FACTOR = 4


@dataclass(frozen=True)
class TokenKind:
    """What the kernels of a one-token forward depend on, for one ring: the rest is in numbers on the device."""

    rows: int  # R: 1 where all rows of the batch stand at the same place, else B
    reads: int  # slots that are read
    full: bool  # each row sees all of them: no mask
    gap: bool  # the first place behind the sinks is a number on the device, too
    apart: bool  # the sinks meet a query of their own
    to_sinks: bool  # some row may take the slot of a sink …
    to_ring: bool  # … or one in the ring


def token_kind(
    layout: Layout,
    origin: int,
    seen: Sequence[int],
    starts: Sequence[int] | None,
    lockstep: bool,
    recorded: bool,
    for_any_place: bool,
) -> TokenKind:
    """The kind of the next token of rows at the places `seen`; see `SinkCache.token_kinds`.

    starts: by row; None where no row has a gap. lockstep: whether all rows have the same places and starts.
    """
    most, least, slots = max(seen) + 1, min(seen) + 1, layout.slots
    reads = READ_STEP_SLOTS
    while reads < most or (recorded and reads <= layout.sinks):
        reads = reads * RECORDED_STEP_FACTOR if recorded else reads + READ_STEP_SLOTS
    reads = min(reads, slots)
    full = not for_any_place and least >= (slots if recorded else reads)
    if starts is not None:  # a row that sees W recent tokens sees all slots
        full = full and all(t + 1 - start >= layout.window for t, start in zip(seen, starts, strict=True))
    return TokenKind(
        rows=1 if lockstep else len(seen),
        reads=reads,
        full=full,
        gap=not full and (recorded or starts is not None),
        apart=layout.sinks > 0 and (recorded or origin > 0 or most > slots or starts is not None),
        to_sinks=layout.sinks > 0 and (not full if recorded else min(seen) < layout.sinks),
        to_ring=recorded or max(seen) >= layout.sinks,
    )
